--!include lists
-- Take over what nobody holds any longer: leases that expired, and delayed messages whose time has come.
--
-- A delayed message goes straight back to its list. An expired lease becomes the caller's, under a new id, so that the
-- caller can count the delivery and decide; should the caller die over it, it expires again.
--
-- Every worker may sweep at any time, and looks in vain at next to no cost. One of them watches for all: it alone is told when
-- the next one is due, so that a fleet of hundreds does not come for it at once.
--
-- KEYS[1]  muai:lease:index     zset lease id -> expiry, ms
-- KEYS[2]  muai:lease:messages  hash lease id -> list name, newline, message
-- KEYS[3]  muai:lease:next      counter
-- KEYS[4]  muai:delayed         hash request id -> the lease under which it waits for its time
-- KEYS[5]  muai:cancelled       zset result key -> time of cancellation, ms
-- KEYS[6]  muai:sweeping        who watches what is due next, for all
-- ARGV[1]  most leases to take over
-- ARGV[2]  lease length, ms
-- ARGV[3]  prefix of delayed leases
-- ARGV[4]  what makes the ids of these leases unlike all others, should the broker have lost its last writes
-- ARGV[5]  who sweeps
-- ARGV[6]  ms that the watch lasts
-- Returns  { ms until the next one is due (-1: none, or another worker watches), lease id, list name .. newline .. message, ... }
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local out = { -1 }
-- What was cancelled meanwhile does not wait out its time: others may wait on what was to follow it.
if redis.call('EXISTS', KEYS[4]) == 1 then
  for _, key in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[5], '+inf', now - 600000, 'LIMIT', 0, 1000)) do
    local lease = redis.call('HGET', KEYS[4], string.sub(key, #'celery-task-meta-' + 1))
    if lease then redis.call('ZADD', KEYS[1], 'XX', now, lease) end
  end
end
for _, lease in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local stored = redis.call('HGET', KEYS[2], lease)
  redis.call('ZREM', KEYS[1], lease)
  redis.call('HDEL', KEYS[2], lease)
  if stored then
    if string.sub(lease, 1, #ARGV[3]) == ARGV[3] then
      local cut, id = string.find(stored, '\n', 1, true), string.match(lease, '\n(.*)')
      if id and redis.call('HGET', KEYS[4], id) == lease then redis.call('HDEL', KEYS[4], id) end
      push(string.sub(stored, 1, cut - 1), 'R', { string.sub(stored, cut + 1) })
    else
      local taken = string.format('%d-%s', redis.call('INCR', KEYS[3]), ARGV[4]) .. (string.match(lease, '/.+') or '')
      redis.call('HSET', KEYS[2], taken, stored)
      redis.call('ZADD', KEYS[1], now + ARGV[2], taken)
      out[#out + 1] = taken
      out[#out + 1] = stored
    end
  end
end
local watcher = redis.call('GET', KEYS[6])
if not watcher then
  redis.call('SET', KEYS[6], ARGV[5], 'PX', ARGV[6])
  watcher = ARGV[5]
end
local next = watcher == ARGV[5] and redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES') or {}
if #next == 2 then out[1] = math.max(0, next[2] - now) end
return out
