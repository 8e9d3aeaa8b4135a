--[[ Joins a worker or keeps it joined. Returns {time, the receipts of its jobs that were cancelled...}.

What the queue has down as this worker's and the worker does not know of goes back: it was handed out by a take whose
answer never arrived. On the first beat it is counted as a try: an earlier worker of the same name died of it, perhaps.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  worker
ARGV[3]  what it says of itself, JSON
ARGV[4]  number of this beat; all beats and takes of a worker are numbered in one series, from 1
ARGV[5..]  in pairs: receipt, job id, of what it has in hand
]]
local worker, turn = ARGV[2], tonumber(ARGV[4])
local known = {}
for i = 5, #ARGV, 2 do
  known[ARGV[i]] = ARGV[i + 1]
end

if turn > 1 and turn < tonumber(redis.call('HGET', key('turns'), worker) or 0) then
  return {seconds(time)} -- overtaken by later ones: what it knows is old
end
redis.call('XTRIM', key('dead'), 'MINID', milliseconds(time - rules.dead_seconds))
redis.call('ZADD', key('beats'), seconds(time), worker)
redis.call('HSET', key('workers'), worker, ARGV[3])
redis.call('HSET', key('turns'), worker, turn)

local answer = {seconds(time)}
for _, stream in ipairs(priorities) do
  for _, pending in ipairs(held_by(worker, stream)) do
    local receipt = stream .. '/' .. pending[1] .. '/' .. pending[4]
    if not known[receipt] then
      put_back(stream, pending[1], pending[4], worker, turn == 1)
    elseif forgotten(stream, pending[1]) or redis.call('HGET', key('job:' .. known[receipt]), 'cancelled') then
      table.insert(answer, receipt)
    end
  end
end
return answer
