-- May messages that did not come through our own client run? Their ids may be those of others: an id runs once at a time.
--
-- KEYS[1]  muai:lease:index  zset lease id -> expiry, ms
-- KEYS[2]  muai:underway     zset request id -> when it was submitted, ms
-- KEYS[3]  muai:contents     hash request id -> digest of its content, while it is under way
-- KEYS[4]  muai:cancelled    zset result key -> time of cancellation, ms: for longer than there is a record
-- ARGV[1]  seconds that a request is remembered as under way, should nobody ever answer it
-- then for each message its lease, its id and its content's digest
-- Returns  one word a message: run, wait (another message of this id is under way) done (it has its answer) or
--          revoked (it was cancelled)
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local TERMINAL = { SUCCESS = 'done', FAILURE = 'done', REVOKED = 'revoked' }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function verdict(lease, id, content)
  local record = redis.pcall('GETRANGE', 'celery-task-meta-' .. id, 0, 95)
  local ended = type(record) == 'string' and TERMINAL[string.match(record, '"status":%s*"(%u+)"') or '']
  if ended then return ended end
  if redis.call('ZSCORE', KEYS[4], 'celery-task-meta-' .. id) then return 'revoked' end
  local holder = redis.call('GET', 'muai:running:' .. id)
  if holder then
    if holder ~= lease and redis.call('ZSCORE', KEYS[1], holder) then return 'wait' end
  elseif redis.call('ZSCORE', KEYS[2], id) then -- of our own client
    return 'wait'
  end
  redis.call('SET', 'muai:running:' .. id, lease, 'EX', ARGV[1])
  redis.call('ZADD', KEYS[2], now, id)
  redis.call('HSET', KEYS[3], id, content)
  return 'run'
end

local old = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - 1000 * ARGV[1], 'LIMIT', 0, 1000)
if #old > 0 then -- as each submission does, where there are none
  redis.call('ZREM', KEYS[2], unpack(old))
  redis.call('HDEL', KEYS[3], unpack(old))
end
local out = {}
for i = 2, #ARGV, 3 do out[#out + 1] = verdict(ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
return out
