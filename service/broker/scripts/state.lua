--[[ The queue's numbers. Returns {time, waiting interactive, waiting batch, seconds the oldest of them has waited,
answered, redelivered, dead, what each live worker said of itself...}.

KEYS[1], ARGV[1]  see common.lua
]]
local oldest = time
for _, stream in ipairs(priorities) do
  local back = redis.call('XPENDING', key(stream), group, '-', '+', 1, room)[1]
  local first = back or redis.call('XRANGE', key(stream), '(' .. delivered[stream], '+', 'COUNT', 1)[1]
  if first then
    -- An entry's id begins with the millisecond in which it was added.
    oldest = math.min(oldest, tonumber(string.match(first[1], '^%d+')) / 1000)
  end
end

local counts = redis.call('HMGET', key('counts'), 'answered', 'redelivered', 'dead')
local state = {seconds(time), waiting(priorities[1]), waiting(priorities[2]), seconds(time - oldest)}
for i = 1, 3 do
  table.insert(state, tonumber(counts[i] or 0))
end
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', key('beats'), '(' .. alive_after(), '+inf')) do
  table.insert(state, redis.call('HGET', key('workers'), worker) or '')
end
return state
