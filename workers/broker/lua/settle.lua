--!include lists
-- End leases, each with its outcome, all or nothing per lease.
--
-- A lease that is no longer held (it expired and somebody else took the message over) is passed over: nothing of its
-- outcome is written. And the first terminal record of a request wins: one that was cancelled, or answered under the same
-- id before, keeps its record, and whoever waits on the reply stream is given that. So a request is answered once.
--
-- KEYS[1]  muai:lease:index     zset lease id -> expiry, ms
-- KEYS[2]  muai:lease:messages  hash lease id -> list name, newline, message
-- KEYS[3]  muai:dead            stream of dead letters
-- KEYS[4]  muai:inflight        hash tenant -> leases of messages from its lanes
-- KEYS[5]  muai:underway        zset request id -> when it was submitted, ms
-- ARGV[1]  seconds that results and reply streams are kept
-- ARGV[2]  most dead letters kept
-- ARGV[3]  prefix of delayed leases
-- then for each lease nine arguments, empty where there is none:
--   lease id
--   result key            written and published, as Celery's Redis backend does
--   result record
--   reply stream          the record is appended to it
--   target list           a message is put on this list; '=' is the list it came from
--   its message           '=' is the message as it was claimed
--   its side              'L' behind everything that waits, 'R' in front of it
--   dead letter           reason; the message is kept beside it
--   due                   ms since the epoch: the message waits until then
-- Returns  one 1 or 0 a lease: whether its outcome was written
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local TERMINAL = { SUCCESS = true, FAILURE = true, REVOKED = true }
local ttl, dead_capacity, delayed = ARGV[1], ARGV[2], ARGV[3]
local replies, settled, ended = {}, {}, {}

-- The record that stands: the one given, or the terminal one that was there before.
local function record_result(key, record)
  if redis.call('SET', key, record, 'NX', 'EX', ttl) then
    redis.call('PUBLISH', key, record)
    return record, true
  end
  local existing = redis.pcall('GET', key) -- an error where the key is no text: then it is overwritten
  local ok, decoded = pcall(cjson.decode, existing)
  if ok and TERMINAL[decoded.status] then return existing, false end
  redis.call('SET', key, record, 'EX', ttl)
  redis.call('PUBLISH', key, record)
  return record, true
end

local function settle(lease, key, record, stream, target, message, side, reason, due)
  if redis.call('ZREM', KEYS[1], lease) == 0 then return 0 end
  local tenant = string.match(lease, '/(.+)')
  if tenant and redis.call('HINCRBY', KEYS[4], tenant, -1) <= 0 then redis.call('HDEL', KEYS[4], tenant) end
  local list, claimed
  if target ~= '' or reason ~= '' or due ~= '' then
    local stored = redis.call('HGET', KEYS[2], lease)
    local cut = string.find(stored, '\n', 1, true)
    list, claimed = string.sub(stored, 1, cut - 1), string.sub(stored, cut + 1)
    if due ~= '' then
      redis.call('HSET', KEYS[2], delayed .. lease, stored)
      redis.call('ZADD', KEYS[1], due, delayed .. lease)
    end
  end
  settled[#settled + 1] = lease
  local stands = true
  if key ~= '' then
    record, stands = record_result(key, record)
    if target == '' then ended[#ended + 1] = string.sub(key, #'celery-task-meta-' + 1) end
  end
  if stream ~= '' then
    redis.pcall('XADD', stream, '*', 'm', record) -- an error where the key is no stream concerns nobody else
    replies[stream] = true
  end
  if not stands then return 0 end
  if target ~= '' then
    push(target == '=' and list or target, side, { message == '=' and claimed or message })
  end
  if reason ~= '' then
    redis.call('XADD', KEYS[3], 'MAXLEN', '~', dead_capacity, '*', 'list', list, 'reason', reason, 'message', claimed)
  end
  return 1
end

local written = {}
for i = 4, #ARGV, 9 do
  written[#written + 1] = settle(unpack(ARGV, i, i + 8))
end
if #settled > 0 then redis.call('HDEL', KEYS[2], unpack(settled)) end
if #ended > 0 then redis.call('ZREM', KEYS[5], unpack(ended)) end
for stream in pairs(replies) do
  redis.call('EXPIRE', stream, ttl)
end
return written
