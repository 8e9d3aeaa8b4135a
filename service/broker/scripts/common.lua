--[[ What the scripts of the Redis broker share. It stands before the text of each of them.

KEYS[1]  the queue: `{deecap:NAME}`. It is no key itself, but every key begins with it, and since it is a hash tag they
         all lie in one slot of a cluster:

  :interactive, :batch  streams of jobs: one entry for each that waits or runs, removed when it is answered.
                        Fields: id, deadline (seconds since 1970), job (JSON), image.
                        They have one consumer group, `workers`. Its consumers are the workers, and `(queue)`, which
                        holds the entries that came back: these wait, before all that were never handed out.
  :job:ID               hash, what is known of one job, so that its id is never enqueued twice.
                        While it waits or runs: priority, entry (its id in the stream), front (who gets the reply),
                        back (hand-outs that were no tries), cancelled (1 if so).
                        Once it is answered, for a minute: reply (empty if cancelled), worker, receipt.
  :replies:FRONT        stream, replies to one front. Field: reply. Expires when no reply came for a minute.
  :beats                sorted set, when each worker's heart last beat.
  :workers              hash, what each worker said of itself.
  :turns                hash, the number of each worker's latest beat or take (see beat.lua).
  :counts               hash: places (filled, for the batch jobs' share), answered, redelivered, dead.
  :bell                 stream of one entry, a new one whenever there is a job to take: idle workers block on it.
  :dead                 stream of dead letters, the newest ones: why, worker, and the fields of the entry.
  :epoch                string, another one whenever the streams were made anew.

ARGV[1]  JSON, the same for all calls of one broker:
  worker_timeout (seconds), tries, share (every which place is for batch jobs), reply_kept (seconds),
  dead_kept (a count), and replies without an id: too_late, poison, unreadable.

A receipt is `PRIORITY/ENTRY/COUNT`. The count grows with every hand-out, so each of them has a receipt of its own, and
whoever holds an older one is refused.
]]
local queue = KEYS[1]
local rules = cjson.decode(ARGV[1])
local group = 'workers'
local room = '(queue)'
local priorities = {'interactive', 'batch'}

local function key(name)
  return queue .. ':' .. name
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local time = clock()

-- Lua's own way to write a number rounds to 14 digits.
local function seconds(number)
  return string.format('%.6f', number)
end

local function milliseconds(number)
  return string.format('%.0f', number * 1000)
end

-- A flat list of names and values as a table.
local function named(flat)
  local found = {}
  for i = 1, #flat, 2 do
    found[flat[i]] = flat[i + 1]
  end
  return found
end

-- The last entry of the stream that the group ever read. Where the store came back empty, the group is made again.
local function last_delivered(stream)
  local groups = redis.pcall('XINFO', 'GROUPS', key(stream))
  if not groups.err then
    for _, info in ipairs(groups) do
      local known = named(info)
      if known.name == group then
        return known['last-delivered-id']
      end
    end
  end
  redis.call('XGROUP', 'CREATE', key(stream), group, '0', 'MKSTREAM')
  redis.call('SET', key('epoch'), seconds(time) .. stream)
  return '0-0'
end
local delivered = {}
for _, stream in ipairs(priorities) do
  delivered[stream] = last_delivered(stream)
end

local function alive_after()
  return seconds(time - rules.worker_timeout)
end

local function alive(worker)
  local beat = redis.call('ZSCORE', key('beats'), worker)
  return beat and tonumber(beat) > time - rules.worker_timeout
end

local function read(stream, entry)
  local found = redis.call('XRANGE', key(stream), entry, entry)[1]
  return found and named(found[2])
end

-- All that a worker has of one stream: {entry, worker, milliseconds idle, count} each.
local function held_by(worker, stream)
  return redis.call('XPENDING', key(stream), group, '-', '+', 1000000, worker)
end

-- Who has the entry, nil if nobody ever had it, and how often it was handed out.
local function holder(stream, entry)
  local found = redis.call('XPENDING', key(stream), group, entry, entry, 1)[1]
  if not found then
    return nil, 0
  end
  return found[2], found[4]
end

-- Stream and entry of a receipt that is still good; nil for any other.
local function owned(worker, receipt)
  local stream, entry, count = string.match(receipt, '^(%a+)/(%d+%-%d+)/(%d+)$')
  if not stream or not delivered[stream] then
    return nil
  end
  local owner, times = holder(stream, entry)
  if owner == worker and times == tonumber(count) then
    return stream, entry
  end
  return nil
end

-- Tries begun: hand-outs but for those that were given back.
local function tries_of(fields, count)
  return count - tonumber(redis.call('HGET', key('job:' .. fields.id), 'back') or 0)
end

local function waiting(stream)
  local summary = redis.call('XPENDING', key(stream), group)
  local running = summary[1]
  for _, consumer in ipairs(summary[4] or {}) do
    if consumer[1] == room then
      running = running - tonumber(consumer[2])
    end
  end
  return redis.call('XLEN', key(stream)) - running
end

local function ring()
  redis.call('XADD', key('bell'), 'MAXLEN', '1', '*', 'rung', '1')
end

local function send(front, reply)
  local replies = key('replies:' .. front)
  redis.call('XADD', replies, '*', 'reply', reply)
  redis.call('PEXPIRE', replies, milliseconds(rules.reply_kept))
end

local function remove(stream, entry)
  redis.call('XACK', key(stream), group, entry)
  redis.call('XDEL', key(stream), entry)
end

-- Removes the entry, and sends the reply unless nobody waits for it.
local function finish(stream, entry, job_id, reply, worker, receipt)
  local job = key('job:' .. job_id)
  local known = redis.call('HMGET', job, 'front', 'cancelled')
  remove(stream, entry)
  if known[2] then
    reply = ''
  else
    redis.call('HINCRBY', key('counts'), 'answered', 1)
    if known[1] then
      send(known[1], reply)
    end
  end
  redis.call('DEL', job)
  redis.call('HSET', job, 'reply', reply, 'worker', worker, 'receipt', receipt)
  redis.call('PEXPIRE', job, milliseconds(rules.reply_kept))
end

-- The broker's own answer; `reply` is one without an id.
local function refuse(stream, entry, job_id, reply)
  reply.id = job_id
  finish(stream, entry, job_id, cjson.encode(reply), '', '')
end

-- Gives a job up, and keeps it for the operator. `reply`, one without an id, tells the front.
local function bury(stream, entry, fields, why, worker, reply)
  local letter = {'why', why, 'worker', worker, 'priority', stream}
  for name, value in pairs(fields) do
    if #letter < 40 then -- what is no job can have any number of fields, and unpack has a limit
      table.insert(letter, name)
      table.insert(letter, value)
    end
  end
  redis.call('XADD', key('dead'), 'MAXLEN', rules.dead_kept, '*', unpack(letter))
  redis.call('HINCRBY', key('counts'), 'dead', 1)
  if fields.id then
    refuse(stream, entry, fields.id, reply)
  else
    remove(stream, entry)
  end
end

-- Whether the entry has what the scripts and the workers need. Other programs can write to the stream too.
local function readable(fields)
  return fields.id and fields.job and fields.image and tonumber(fields.deadline)
end

-- Lets a job wait again that a worker had, at the head of its queue. `tried`: whether that was one of its tries.
local function put_back(stream, entry, count, worker, tried)
  local fields = read(stream, entry)
  if not fields then
    return remove(stream, entry) -- somebody deleted it from the stream
  end
  if not readable(fields) then
    return bury(stream, entry, fields, 'unreadable', worker, rules.unreadable)
  end
  local job = key('job:' .. fields.id)
  if redis.call('HGET', job, 'cancelled') then
    remove(stream, entry)
    redis.call('DEL', job)
    return
  end
  if tried and tries_of(fields, count) >= rules.tries then
    return bury(stream, entry, fields, 'poison', worker, rules.poison)
  end
  redis.call('XCLAIM', key(stream), group, room, 0, entry, 'JUSTID')
  if tried then
    redis.call('HINCRBY', key('counts'), 'redelivered', 1)
  elseif redis.call('EXISTS', job) == 1 then
    redis.call('HINCRBY', job, 'back', 1)
  end
  ring()
end

-- Forgets a worker; what it has waits again.
local function remove_worker(worker, tried)
  for _, stream in ipairs(priorities) do
    for _, pending in ipairs(held_by(worker, stream)) do
      put_back(stream, pending[1], pending[4], worker, tried)
    end
    redis.call('XGROUP', 'DELCONSUMER', key(stream), group, worker) -- it has nothing left to lose
  end
  redis.call('ZREM', key('beats'), worker)
  redis.call('HDEL', key('workers'), worker)
  redis.call('HDEL', key('turns'), worker)
end

