--[[ Where a job is. Returns {'queued', how many of its priority come before it, note}, {'running', note}, {'done', the
reply, note}, or nothing where it is not known or nobody wants it. A job that waits past its deadline, or that a dead
worker has, is answered here: perhaps no worker ever comes to do it.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  id of the job
]]
local id = ARGV[2]
local job = key('job:' .. id)
local known = named(redis.call('HGETALL', job))
local place = place_of(known)
local late = place and not known.cancelled and tonumber(known.deadline or math.huge) <= time
if late and (place == 'queued' or not alive((holder(known.priority, known.entry)))) then
  refuse(known.priority, known.entry, id, rules.too_late)
  known = named(redis.call('HGETALL', job))
  place = nil
end
if known.reply and known.reply ~= '' then
  return {'done', known.reply, known.note or ''}
elseif not place or known.cancelled then
  return {}
elseif place == 'queued' then
  return {'queued', redis.call('ZRANK', key('line:' .. known.priority), known.entry), known.note or ''}
end
return {'running', known.note or ''}
