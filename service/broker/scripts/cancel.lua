--[[ Deletes a job that waits; flags one that runs, for its worker's next beat.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  id of the job
]]
local job = key('job:' .. ARGV[2])
local known = redis.call('HMGET', job, 'priority', 'entry')
local stream, entry = known[1], known[2]
if not entry then
  return -- never submitted, or answered
end
local owner = holder(stream, entry)
if owner and owner ~= room then
  redis.call('HSET', job, 'cancelled', '1')
else
  remove(stream, entry)
  redis.call('DEL', job)
end
