--[[ Hands jobs to a worker. Returns {bell, {receipt, attempt, seconds in the queue, id, job, image}...}; `bell` is the
last entry of the stream :bell, to block on where there is no job.

First the jobs of dead workers are put back. Then places are filled one after the other: each is offered to interactive
jobs first and then to batch jobs, every `share`th the other way round. Within a priority, jobs that came back are the
oldest and come first. One that was tried before comes alone. Jobs past their deadline are answered and fill no place.
Once the photos make `take_bytes`, the rest is left for the next take.

A worker that is not joined gets nothing. Nor does a take that later beats or takes of the worker have overtaken: it was
on its way for so long that the worker has given it up, and nobody would get the jobs.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  worker
ARGV[3]  how many jobs it wants at most
ARGV[4]  number of this take, see beat.lua
]]
local worker, count, turn = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local rung = redis.call('XREVRANGE', key('bell'), '+', '-', 'COUNT', 1)[1]
local answer = {rung and rung[1] or '0-0'}
if not alive(worker) or turn < tonumber(redis.call('HGET', key('turns'), worker)) then
  return answer
end
redis.call('HSET', key('turns'), worker, turn)

for _, dead in ipairs(redis.call('ZRANGEBYSCORE', key('beats'), '-inf', alive_after())) do
  remove_worker(dead, true)
end

-- The first of those that came back: it stays in the room until it is claimed.
local function returned(stream)
  local found = redis.call('XPENDING', key(stream), group, '-', '+', 1, room)[1]
  return found and {id = found[1], count = found[4] + 1, fields = read(stream, found[1]), in_room = true}
end

-- The first of those never handed out: it is the worker's now.
local function fresh(stream)
  local found = redis.call('XREADGROUP', 'GROUP', group, worker, 'COUNT', 1, 'STREAMS', key(stream), '>')
  local entry = found and found[1] and found[1][2][1]
  if entry then
    -- Nothing of this stream waits before it, or it would have come first: what the line still has was deleted.
    redis.call('ZREMRANGEBYSCORE', key('line:' .. stream), '-inf', rank(entry[1]))
  end
  return entry and {id = entry[1], count = 1, fields = named(entry[2])}
end

local function first(stream)
  while true do
    local entry = returned(stream) or fresh(stream)
    if not entry then
      return nil
    elseif not entry.fields then
      remove(stream, entry.id) -- somebody deleted it from the stream
    elseif not readable(entry.fields) then
      bury(stream, entry.id, entry.fields, 'unreadable', worker, rules.unreadable)
    elseif tonumber(entry.fields.deadline) <= time then
      refuse(stream, entry.id, entry.fields.id, rules.too_late)
    else
      entry.stream = stream
      return entry
    end
  end
end

local function first_for(place)
  if place % rules.share == rules.share - 1 then
    return first('batch') or first('interactive')
  end
  return first('interactive') or first('batch')
end

local places = tonumber(redis.call('HGET', key('counts'), 'places') or 0)
local drawn, bytes = 0, 0
while drawn < count and bytes < rules.take_bytes do
  local entry = first_for(places + drawn)
  if not entry then
    break
  end
  local attempt = tries_of(entry.fields, entry.count)
  if attempt > 1 and drawn > 0 then
    break -- it comes with the next take
  end
  if entry.in_room then
    redis.call('XCLAIM', key(entry.stream), group, worker, 0, entry.id, 'RETRYCOUNT', entry.count, 'JUSTID')
    leave_line(entry.stream, entry.id)
  end
  drawn, bytes = drawn + 1, bytes + #entry.fields.image
  local receipt = entry.stream .. '/' .. entry.id .. '/' .. entry.count
  local waited = math.max(0, time - tonumber(string.match(entry.id, '^%d+')) / 1000)
  table.insert(answer, {receipt, attempt, seconds(waited), entry.fields.id, entry.fields.job, entry.fields.image})
  if attempt > 1 then
    break
  end
end
if drawn > 0 then
  redis.call('HINCRBY', key('counts'), 'places', drawn)
end
return answer
