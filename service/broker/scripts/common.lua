--[[ What the scripts of the Redis broker share. It stands before the text of each of them.

KEYS[1]  the queue: `{deecap:NAME}`. It is no key itself, but every key begins with it, and since it is a hash tag they
         all lie in one slot of a cluster:

  :interactive, :batch  streams of jobs: one entry for each that waits or runs, removed when it is answered.
                        Fields: id, deadline (seconds since 1970), job (JSON), image.
                        They have one consumer group, `workers`. Its consumers are the workers, and `(queue)`, which
                        holds the entries that came back: these wait, before all that were never handed out.
  :job:ID               hash, what is known of one job, so that its id is never enqueued twice.
                        While it waits or runs: priority, entry (its id in the stream), deadline, front (who gets words
                        and reply), back (hand-outs that were no tries), cancelled (1 if so), kept (see `reply_kept`),
                        note. Once it is answered: reply (empty if cancelled), worker, receipt, note. Expires.
  :line:interactive, :line:batch
                        sorted sets, the entries that wait, in their order: where a job stands in the queue.
  :replies:FRONT        stream, what one front hears. Field: reply or words. Expires when none came for a minute.
  :kept                 sorted set, `BYTES/ID` of the outcomes kept for longer than `reply_kept`, by when that ends. Expires.
  :beats                sorted set, when each worker's heart last beat.
  :workers              hash, what each worker said of itself.
  :turns                hash, the number of each worker's latest beat or take (see beat.lua).
  :counts               hash: places (filled, for the batch jobs' share), answered, redelivered, dead, kept (the
                        bytes of all in :kept).
  :bell                 stream of one entry, a new one whenever there is a job to take: idle workers block on it.
  :forgotten            set, `PRIORITY/ENTRY` of those that run and that everybody is to forget. Nothing is known of
                        their ids any more, which may be given to other jobs meanwhile.
  :dead                 stream of dead letters, the newest ones: why, worker, and the fields of the entry. Expires.
  :seen                 string, when a script last ran, about: by this a store knows that it was away.
  :epoch                string, another one whenever the streams were made anew.

ARGV[1]  JSON, the same for all calls of one broker:
  worker_timeout (seconds), tries, share (every which place is for batch jobs), take_bytes (of photos in one take),
  reply_kept (seconds that an answered job is known; more where `kept` of the job is), kept_bytes (of the outcomes
  with more, together), away (seconds, see below),
  dead_kept (a count), dead_bytes, dead_seconds, and replies without an id: too_late, poison, unreadable.

A receipt is `PRIORITY/ENTRY/COUNT`. The count grows with every hand-out, so each of them has a receipt of its own, and
whoever holds an older one is refused.
]]
local queue = KEYS[1]
local rules = cjson.decode(ARGV[1])
local group = 'workers'
local room = '(queue)'
local priorities = {'interactive', 'batch'}
local month = 30 * 24 * 3600 -- the longest that anything is kept, whatever was asked for

local function key(name)
  return queue .. ':' .. name
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local time = clock()

-- A store whose memory is full (OOM) refuses a script's first write if that could grow it, and none after another
-- write. Only new jobs shall be refused, so all other scripts begin with a write that cannot grow anything.
if not ADMITS then
  redis.call('DEL', key('nothing'))
end

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

-- Who did not beat while nobody could is not dead: where no script ran for long, all workers begin anew.
local function notice_absence()
  local seen = tonumber(redis.call('GET', key('seen')) or time)
  if time - seen > rules.away then
    for _, worker in ipairs(redis.call('ZRANGE', key('beats'), 0, -1)) do
      redis.call('ZADD', key('beats'), seconds(time), worker)
    end
  end
  if seen == time or time - seen > rules.away / 8 then -- not with every script: it would all go to the log on disk
    redis.call('SET', key('seen'), seconds(time))
  end
end
notice_absence()

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

-- Orders entries as their ids `MILLISECONDS-NUMBER` do, exactly as long as fewer than 1024 come in one millisecond.
local function rank(entry)
  local milliseconds_of, number = string.match(entry, '^(%d+)-(%d+)$')
  return string.format('%.0f', tonumber(milliseconds_of) * 1024 + math.min(tonumber(number), 1023))
end

local function line_up(stream, entry)
  redis.call('ZADD', key('line:' .. stream), rank(entry), entry)
end

local function leave_line(stream, entry)
  redis.call('ZREM', key('line:' .. stream), entry)
end

-- 'queued' or 'running'; nil for a job that is answered, unknown, or no longer in its stream. `known`: its hash.
local function place_of(known)
  if not known.entry then
    return nil
  end
  local owner = holder(known.priority, known.entry)
  if owner and owner ~= room then
    return 'running'
  end
  return redis.call('ZSCORE', key('line:' .. known.priority), known.entry) and 'queued' or nil
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

-- `kind`: reply or words.
local function send(front, kind, said)
  local replies = key('replies:' .. front)
  redis.call('XADD', replies, '*', kind, said)
  redis.call('PEXPIRE', replies, milliseconds(rules.reply_kept))
end

local function forget(stream, entry)
  redis.call('SADD', key('forgotten'), stream .. '/' .. entry)
end

local function forgotten(stream, entry)
  return redis.call('SISMEMBER', key('forgotten'), stream .. '/' .. entry) == 1
end

local function remove(stream, entry)
  redis.call('XACK', key(stream), group, entry)
  redis.call('XDEL', key(stream), entry)
  redis.call('SREM', key('forgotten'), stream .. '/' .. entry)
  leave_line(stream, entry)
end

-- What is in :kept of an answered job. `known`: its hash.
local function kept_as(job_id, known)
  return #known.reply + #(known.note or '') .. '/' .. job_id
end

-- To be called when the outcome goes, whether or not it is among those.
local function unkeep(member)
  if redis.call('ZREM', key('kept'), member) == 1 then
    redis.call('HINCRBY', key('counts'), 'kept', -tonumber(string.match(member, '^%d+')))
  end
end

-- Counts an outcome that is kept until then. Where all together are too large, those go that would go first.
local function keep(member, ends)
  for _, over in ipairs(redis.call('ZRANGEBYSCORE', key('kept'), '-inf', seconds(time))) do
    unkeep(over)
  end
  if redis.call('EXISTS', key('kept')) == 0 then
    redis.call('HDEL', key('counts'), 'kept')
  end
  redis.call('ZADD', key('kept'), seconds(ends), member)
  redis.call('PEXPIRE', key('kept'), milliseconds(month))
  local bytes = redis.call('HINCRBY', key('counts'), 'kept', tonumber(string.match(member, '^%d+')))
  while bytes > rules.kept_bytes do
    local first = redis.call('ZRANGE', key('kept'), 0, 0)[1]
    if not first then
      break
    end
    local job = key('job:' .. string.match(first, '/(.*)$'))
    if redis.call('HEXISTS', job, 'reply') == 1 then
      redis.call('DEL', job)
    end
    unkeep(first)
    bytes = tonumber(redis.call('HGET', key('counts'), 'kept'))
  end
end

-- Removes the entry, and sends the reply unless nobody waits for it.
local function finish(stream, entry, job_id, reply, worker, receipt)
  if forgotten(stream, entry) then
    return remove(stream, entry)
  end
  local job = key('job:' .. job_id)
  local known = redis.call('HMGET', job, 'front', 'cancelled', 'kept', 'note')
  remove(stream, entry)
  if known[2] then
    reply = ''
  else
    redis.call('HINCRBY', key('counts'), 'answered', 1)
    if known[1] then
      send(known[1], 'reply', reply)
    end
  end
  redis.call('DEL', job)
  redis.call('HSET', job, 'reply', reply, 'worker', worker, 'receipt', receipt, 'note', known[4] or '')
  local kept = math.max(rules.reply_kept, math.min(tonumber(known[3]) or 0, month))
  redis.call('PEXPIRE', job, milliseconds(kept))
  if kept > rules.reply_kept and reply ~= '' then
    keep(kept_as(job_id, {reply = reply, note = known[4]}), time + kept)
  end
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
  local dead = key('dead')
  redis.call('XADD', dead, 'MAXLEN', rules.dead_kept, '*', unpack(letter))
  redis.call('PEXPIRE', dead, milliseconds(rules.dead_seconds))
  local count = redis.call('XLEN', dead)
  while count > 1 and redis.call('MEMORY', 'USAGE', dead, 'SAMPLES', 0) > rules.dead_bytes do
    count = count - redis.call('XTRIM', dead, 'MAXLEN', count - 1)
  end
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
  if not fields or forgotten(stream, entry) then
    return remove(stream, entry) -- or somebody deleted it from the stream
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
  line_up(stream, entry)
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

