--!include lists
-- End leases, each with what follows from it, all or nothing per lease.
--
-- A lease that is no longer held (it expired and somebody else took the message over) is passed over: nothing of its
-- settlement is written. And the first terminal record of a request wins: one that was cancelled, or answered under the same
-- id before, keeps its record, and whoever waits on the reply stream is given that. So a request is answered once. One that was
-- cancelled and is to go on goes on: the worker that has it next ends it, and tells everybody who waits for its end.
--
-- KEYS[1]  muai:lease:index     zset lease id -> expiry, ms
-- KEYS[2]  muai:lease:messages  hash lease id -> list name, newline, message
-- KEYS[3]  muai:dead            stream of dead letters
-- KEYS[4]  muai:inflight        hash tenant -> leases of messages from its lanes
-- KEYS[5]  muai:underway        zset request id -> when it was submitted, ms
-- KEYS[6]  muai:delayed         hash request id -> the lease under which it waits for its time
-- KEYS[7]  muai:contents        hash request id -> digest of its content, while it is under way
-- KEYS[8]  muai:deadlines       zset request id, newline, list -> its deadline, ms
-- KEYS[9]  muai:cancelled       zset result key -> time of cancellation, ms
-- ARGV[1]  JSON: { ttl            seconds that results and reply streams are kept
--                  dead_capacity  most dead letters kept
--                  dead_bytes     most memory that they take
--                  delayed        prefix of delayed leases
--                  leases         a list of settlements }
-- ARGV[2+] payloads: records and messages
--
-- A settlement is an object; what it does not do is left out:
--   lease    its lease
--   id       the request's id: where its message goes nowhere it is not under way any longer
--   result   result key: written and published, as Celery's Redis backend does
--   record   result record: the number of a payload
--   cancel   true: it ends because it was cancelled. Who has cancelled it has written its record, which may be gone by now
--   reply    reply stream: the record is appended to it
--   list     a message is put on this list; '=' is the list it came from
--   message  its message: the number of a payload; none is the message as it was claimed
--   front    true: in front of everything that waits there; false: behind it
--   reason   the message becomes a dead letter, with this reason
--   due      ms since the epoch: the message waits until then
--   deadline ms since the epoch: its request is not wanted after that, and
--   entry    the name under which that was noted: it goes with the message, and ends with the request
-- A cancelled request that goes on to another list goes there all the same: it is ended where it is claimed next, by whoever
-- then holds it, and tells the rest of its canvas.
-- Returns  a number a lease: 0 it was no longer held; 1 written; 2 the record of a cancellation stands, 3 that of an answer
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local LOST, DONE, CANCELLED, ANSWERED = 0, 1, 2, 3
local STANDS = { SUCCESS = ANSWERED, FAILURE = ANSWERED, REVOKED = CANCELLED }
local terms = cjson.decode(ARGV[1])
local replies, settled, ended, died = {}, {}, {}, false

-- Write a result; returns the record that stands, the one given or the terminal one that was there before, and how so.
local function record_result(key, record)
  if redis.call('SET', key, record, 'NX', 'EX', terms.ttl) then
    redis.call('PUBLISH', key, record)
    return record, DONE
  end
  local existing = redis.pcall('GET', key) -- an error where the key is no text: then it is overwritten
  local ok, decoded = pcall(cjson.decode, existing)
  if ok and type(decoded) == 'table' and STANDS[decoded.status] then return existing, STANDS[decoded.status] end
  redis.call('SET', key, record, 'EX', terms.ttl)
  redis.call('PUBLISH', key, record)
  return record, DONE
end

local function payload(place)
  return place and ARGV[1 + place]
end

local function settle(it)
  if redis.call('ZREM', KEYS[1], it.lease) == 0 then return LOST end
  local tenant = string.match(it.lease, '/(.+)')
  if tenant and redis.call('HINCRBY', KEYS[4], tenant, -1) <= 0 then redis.call('HDEL', KEYS[4], tenant) end
  local list, claimed
  if it.list or it.reason or it.due then
    local stored = redis.call('HGET', KEYS[2], it.lease)
    if not stored then return LOST end
    local cut = string.find(stored, '\n', 1, true)
    list, claimed = string.sub(stored, 1, cut - 1), string.sub(stored, cut + 1)
    if it.due then
      local delayed = terms.delayed .. it.lease .. (it.id and '\n' .. it.id or '')
      redis.call('HSET', KEYS[2], delayed, stored)
      redis.call('ZADD', KEYS[1], it.due, delayed)
      if it.id then redis.call('HSET', KEYS[6], it.id, delayed) end
    end
  end
  settled[#settled + 1] = it.lease
  if it.deadline then
    redis.call('ZREM', KEYS[8], it.entry)
    local on = it.list ~= '=' and it.list or (it.list or it.due) and list
    if on then redis.call('ZADD', KEYS[8], it.deadline, string.match(it.entry, '^.-\n') .. on) end
  end
  local record, written = payload(it.record), DONE
  if it.result and it.cancel and redis.call('ZSCORE', KEYS[9], it.result) and redis.call('EXISTS', it.result) == 0 then
    written = CANCELLED
  elseif it.result then
    record, written = record_result(it.result, record)
  end
  if written == CANCELLED and not it.list then redis.call('ZREM', KEYS[9], it.result) end
  if it.id and not it.list and not it.due then ended[#ended + 1] = it.id end
  if it.reply and record then
    redis.pcall('XADD', it.reply, '*', 'm', record) -- an error where the key is no stream concerns nobody else
    replies[it.reply] = true
  end
  if it.list and written == CANCELLED then written = DONE end
  if written ~= DONE then return written end
  if it.list then
    push(it.list == '=' and list or it.list, it.front and 'R' or 'L', { payload(it.message) or claimed })
  end
  if it.reason then
    redis.call('XADD', KEYS[3], 'MAXLEN', '~', terms.dead_capacity, '*', 'list', list, 'reason', it.reason, 'message', claimed)
    died = true
  end
  return DONE
end

local written = {}
for _, it in ipairs(terms.leases) do written[#written + 1] = settle(it) end
if #settled > 0 then redis.call('HDEL', KEYS[2], unpack(settled)) end
if #ended > 0 then
  redis.call('ZREM', KEYS[5], unpack(ended))
  redis.call('HDEL', KEYS[7], unpack(ended))
  for i, id in ipairs(ended) do ended[i] = 'muai:running:' .. id end
  redis.call('DEL', unpack(ended))
end
for stream in pairs(replies) do
  redis.call('EXPIRE', stream, terms.ttl)
end
if died then -- the oldest eighth goes, and again, until the rest fits
  local left = redis.call('XLEN', KEYS[3])
  while left > 1 and redis.call('MEMORY', 'USAGE', KEYS[3], 'SAMPLES', 0) > terms.dead_bytes do
    redis.call('XTRIM', KEYS[3], 'MAXLEN', math.floor(left * 7 / 8))
    left = redis.call('XLEN', KEYS[3])
  end
end
return written
