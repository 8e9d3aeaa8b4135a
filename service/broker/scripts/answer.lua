--[[ Sends a reply, acknowledges the entry and deletes it. Returns 1, also where this very delivery was answered before
(its answer arrived and the word of that did not); 0 where the job is not this worker's any more.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  worker
ARGV[3]  receipt
ARGV[4]  id of the job
ARGV[5]  the reply
]]
local worker, receipt, id = ARGV[2], ARGV[3], ARGV[4]
local stream, entry = owned(worker, receipt)
if stream then
  finish(stream, entry, id, ARGV[5], worker, receipt)
  return 1
end
local known = redis.call('HMGET', key('job:' .. id), 'worker', 'receipt')
return known[1] == worker and known[2] == receipt and 1 or 0
