--[[ Admits a job and enqueues it; its image is stored only if it was admitted.

Returns {'taken'}, {'known'} if its id waits or runs, {'answered'} if its reply was sent again, {'no_worker'}, or
{'full', jobs that wait}.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  id of the job
ARGV[3]  priority
ARGV[4]  front that asks; it gets the reply
ARGV[5]  deadline, seconds since 1970
ARGV[6]  depth: how many jobs of this priority may wait
ARGV[7]  kept: seconds that its outcome can be found
ARGV[8]  note, to be found with the outcome
ARGV[9]  the job as JSON
ARGV[10]  the image
]]
local id, stream, front, deadline, depth = ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local job = key('job:' .. id)

local known = named(redis.call('HGETALL', job))
if known.reply and known.reply ~= '' then
  send(front, 'reply', known.reply)
  return {'answered'}
end
if known.entry and read(known.priority, known.entry) then
  redis.call('HSET', job, 'front', front)
  redis.call('HDEL', job, 'cancelled') -- somebody waits for it again
  return {'known'}
end
if redis.call('ZCOUNT', key('beats'), '(' .. alive_after(), '+inf') == 0 then
  return {'no_worker'}
end
local waits = waiting(stream)
if waits >= depth then
  return {'full', waits}
end

local entry = redis.call('XADD', key(stream), '*', 'id', id, 'deadline', deadline, 'job', ARGV[9], 'image', ARGV[10])
redis.call('DEL', job)
redis.call('HSET', job, 'priority', stream, 'entry', entry, 'deadline', deadline, 'front', front)
redis.call('HSET', job, 'kept', ARGV[7], 'note', ARGV[8])
line_up(stream, entry)
-- Long after the deadline nobody asks: what is left of a job that was lost in some way goes by itself.
redis.call('PEXPIREAT', job, milliseconds(math.max(time, math.min(tonumber(deadline), time + month)) + 3600))
ring()
return {'taken'}
