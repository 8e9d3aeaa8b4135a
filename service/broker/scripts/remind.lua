--[[ What submit.lua does for a job that is known, without the job. Returns 1, or 0 if it is not known.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  id of the job
ARGV[3]  front that asks; it gets the words and the reply from now on
]]
local job = key('job:' .. ARGV[2])
local known = named(redis.call('HGETALL', job))
if known.reply and known.reply ~= '' then
  send(ARGV[3], 'reply', known.reply)
  return 1
end
if place_of(known) then
  redis.call('HSET', job, 'front', ARGV[3])
  redis.call('HDEL', job, 'cancelled')
  return 1
end
return 0
