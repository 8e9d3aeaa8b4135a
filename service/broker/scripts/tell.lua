--[[ Sends words to the fronts that wait for them. Those of a job that is not this worker's any more, or that nobody
waits for, are dropped.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  worker
ARGV[3..]  in threes: receipt, id of the job, the words as JSON
]]
for i = 3, #ARGV, 3 do
  local stream, entry = owned(ARGV[2], ARGV[i])
  if stream and not forgotten(stream, entry) then
    local known = redis.call('HMGET', key('job:' .. ARGV[i + 1]), 'front', 'cancelled')
    if known[1] and not known[2] then
      send(known[1], 'words', ARGV[i + 2])
    end
  end
end
