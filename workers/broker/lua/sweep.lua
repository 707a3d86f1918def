--!include lists
-- Take over what nobody holds any longer: leases that expired, and delayed messages whose time has come.
--
-- An expired lease becomes the caller's, under a new id, so that the caller can count the delivery and decide; should the
-- caller die over it, it expires again. Where there are more than can be taken the youngest are, since the caller puts them
-- back in front of what waits, and then comes for those that were before them. A delayed message goes straight back to the
-- front of its list, but behind those of the list that came back before it.
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
-- KEYS[7]  muai:released        hash list -> the delayed message that came back to it last
-- ARGV[1]  most leases to take over
-- ARGV[2]  lease length, ms
-- ARGV[3]  prefix of delayed leases
-- ARGV[4]  what makes the ids of these leases unlike all others, should the broker have lost its last writes
-- ARGV[5]  who sweeps
-- ARGV[6]  ms that the watch lasts
-- Returns  { ms until the next one is due (-1: none, -2: another worker watches), the broker's time in microseconds,
--            lease id, list name .. newline .. message, ... }
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local LOOKED_AT, RELEASED, BYTES, AT_ONCE = 20000, 5000, 16777216, 100
local FRONT, MEMORY = 50000, 600
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local out, prefix = { -1, time[1] * 1000000 + time[2] }, ARGV[3]

-- Leases in the order in which they were made: their names begin with a counter.
local function before(a, b)
  return a.number < b.number
end

local function sooner(a, b)
  if a.due ~= b.due then return a.due < b.due end
  return before(a, b)
end

local function in_order(entries, order)
  for i = 2, #entries do
    if order(entries[i], entries[i - 1]) then return table.sort(entries, order) end
  end
end

-- The messages of leases, which end; more of them as long as they are not too many bytes.
local function ended(entries, first, last, most)
  local bytes, at = 0, first
  while at <= last and bytes < most do
    local leases = {}
    for i = at, math.min(at + AT_ONCE - 1, last) do leases[#leases + 1] = entries[i].lease end
    for i, stored in ipairs(redis.call('HMGET', KEYS[2], unpack(leases))) do
      entries[at + i - 1].stored = stored
      bytes = bytes + (stored and #stored or 0)
    end
    redis.call('ZREM', KEYS[1], unpack(leases))
    redis.call('HDEL', KEYS[2], unpack(leases))
    at = at + #leases
  end
  return at - 1, bytes
end

-- Put messages, the youngest first, in front of what waits on a list, but behind those that came back before them.
local function release(list, messages)
  local last = redis.call('HGET', KEYS[7], list)
  local place = last and redis.call('LPOS', list, last, 'RANK', -1, 'MAXLEN', FRONT)
  local ahead, bytes = {}, 0
  local count = place and redis.call('LLEN', list) - place or 0
  while #ahead < count and bytes < BYTES do
    for _, message in ipairs(redis.call('RPOP', list, math.min(AT_ONCE, count - #ahead))) do
      ahead[#ahead + 1] = message
      bytes = bytes + #message
    end
  end
  if #ahead == count then push(list, 'R', messages) end
  for i = #ahead, 1, -1 do redis.call('RPUSH', list, ahead[i]) end
  if #ahead < count then -- these are large: the broker had better not hold them all at once
    for _, message in ipairs(messages) do redis.call('LINSERT', list, 'BEFORE', last, message) end
    counted(list, messages)
  end
  redis.call('HSET', KEYS[7], list, messages[1])
  redis.call('EXPIRE', KEYS[7], MEMORY)
end

-- What was cancelled meanwhile does not wait out its time: others may wait on what was to follow it.
if redis.call('EXISTS', KEYS[4]) == 1 then
  for _, key in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[5], '+inf', now - 600000, 'LIMIT', 0, 1000)) do
    local lease = redis.call('HGET', KEYS[4], string.sub(key, #'celery-task-meta-' + 1))
    if lease then redis.call('ZADD', KEYS[1], 'XX', now, lease) end
  end
end

local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'WITHSCORES', 'LIMIT', 0, LOOKED_AT)
local expired, delayed = {}, {}
for i = 1, #due, 2 do
  local lease = due[i]
  local waits = string.sub(lease, 1, #prefix) == prefix
  local kind = waits and delayed or expired
  kind[#kind + 1] = { lease = lease, due = tonumber(due[i + 1]), number = tonumber(string.match(lease, '%d+')) or 0 }
end
local more = #due == 2 * LOOKED_AT

in_order(expired, before)
local first = math.max(1, #expired - ARGV[1] + 1)
local youngest = {}
for i = #expired, first, -1 do youngest[#youngest + 1] = expired[i] end
local taken, size = ended(youngest, 1, #youngest, BYTES)
more = more or taken < #expired
for i = taken, 1, -1 do
  local entry = youngest[i]
  if entry.stored then
    local lease = string.format('%d-%s', redis.call('INCR', KEYS[3]), ARGV[4]) .. (string.match(entry.lease, '/.+') or '')
    redis.call('HSET', KEYS[2], lease, entry.stored)
    redis.call('ZADD', KEYS[1], now + ARGV[2], lease)
    out[#out + 1] = lease
    out[#out + 1] = entry.stored
  end
end

in_order(delayed, sooner)
local back = ended(delayed, 1, math.min(#delayed, RELEASED), BYTES - size)
more = more or back < #delayed
local lists = {}
for i = back, 1, -1 do
  local stored, id = delayed[i].stored, string.match(delayed[i].lease, '\n(.*)')
  if id and redis.call('HGET', KEYS[4], id) == delayed[i].lease then redis.call('HDEL', KEYS[4], id) end
  if stored then
    local cut = string.find(stored, '\n', 1, true)
    local list = string.sub(stored, 1, cut - 1)
    if not lists[list] then lists[list] = {} end
    lists[list][#lists[list] + 1] = string.sub(stored, cut + 1)
  end
end
for list, messages in pairs(lists) do release(list, messages) end

local watcher = redis.call('GET', KEYS[6])
if not watcher then
  redis.call('SET', KEYS[6], ARGV[5], 'PX', ARGV[6])
  watcher = ARGV[5]
end
local next = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if more then
  out[1] = 0
elseif watcher ~= ARGV[5] then
  out[1] = -2
elseif #next == 2 then
  out[1] = math.max(0, next[2] - now)
end
return out
