--[[ Deletes a job that waits; flags one that runs, for its worker's next beat. Returns 'queued' or 'running', where it
was; nothing if it is not known, or if another front has asked for it since.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  id of the job
ARGV[3]  front that does not wait for it any more; empty: nobody wants it, and its outcome is forgotten too
]]
local job = key('job:' .. ARGV[2])
local known = named(redis.call('HGETALL', job))
local anybody = ARGV[3] == ''
if known.reply then
  if anybody then
    unkeep(kept_as(ARGV[2], known))
    redis.call('DEL', job)
  end
  return false
end
local place = place_of(known)
if place == 'running' and anybody then
  forget(known.priority, known.entry)
  redis.call('DEL', job)
  return place
end
if not place or known.cancelled or not (anybody or known.front == ARGV[3]) then
  return false
end
if place == 'running' then
  redis.call('HSET', job, 'cancelled', '1')
else
  remove(known.priority, known.entry)
  redis.call('DEL', job)
end
return place
