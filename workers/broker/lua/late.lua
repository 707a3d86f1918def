--!include lists
-- Take over requests whose deadline has passed while they wait on a list, so that whoever waits for them is told at once and
-- their room is free.
--
-- What is late has mostly waited for long, so a list is searched from the end at which it is claimed. What is on no list is in
-- the hands of a worker, which sees to it, or gone: it is forgotten after a while.
--
-- KEYS[1]  muai:lease:index     zset lease id -> expiry, ms
-- KEYS[2]  muai:lease:messages  hash lease id -> list name, newline, message
-- KEYS[3]  muai:lease:next      counter
-- KEYS[4]  muai:inflight        hash tenant -> leases of messages from its lanes
-- KEYS[5]  muai:deadlines       zset request id, newline, list -> its deadline, ms
-- KEYS[6]  muai:looked          hash list -> the last message that was looked at, see unread.lua
-- ARGV[1]  lease length, ms
-- ARGV[2]  what makes the ids of these leases unlike all others, should the broker have lost its last writes
-- ARGV[3]  ms for which a worker that holds a late request is left to see to it
-- ARGV[4]  the list at which an earlier call has stopped, and
-- ARGV[5]  the place there at which to go on
-- Returns  { ms until the next one is late (-1: none is known, 0: come again at once), now in ms, the list at which this call has
--            stopped, the place there, lease id, deadline in ms, list name .. newline .. message, ... }
if redis.call('EXISTS', KEYS[5]) == 0 then return { -1, 0, '', 0 } end
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local MOST, LOOKED_AT, BYTES, PAGE_BYTES, FORGOTTEN = 500, 2000, 4194304, 262144, 10000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local out = { -1, now, '', 0 }

-- The id of a message's request, which stands near its end; nil where it cannot be told.
local function id_of(message)
  return string.match(string.sub(message, -1024), '"correlation_id":%s*"([^"\\]+)"')
end

local wanted, lists = {}, {}
local late = redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', now - ARGV[3], 'WITHSCORES', 'LIMIT', 0, MOST)
for i = 1, #late, 2 do
  local id, list = string.match(late[i], '^(.-)\n(.*)$')
  if not wanted[list] then
    wanted[list] = {}
    lists[#lists + 1] = list
  end
  wanted[list][id] = tonumber(late[i + 1])
end
if wanted[ARGV[4]] then
  for i, list in ipairs(lists) do
    if list == ARGV[4] then lists[1], lists[i] = list, lists[1] end
  end
end

-- The message is no longer on its list.
local function removed(list, message)
  local queue, tenant, affinity, shared = parts(list)
  local state = 'muai:queue:' .. queue
  if redis.call('EXISTS', state) == 1 then
    redis.call('HINCRBY', state, 'bytes', -#message)
    if list ~= shared then redis.call('HINCRBY', state, 'laned', -1) end
  end
  if list ~= shared and not affinity and redis.call('EXISTS', list, affine_lanes(shared, tenant)) == 0 then
    redis.call('ZREM', 'muai:lanes:' .. shared, tenant)
  end
  return list ~= shared and tenant or ''
end

local function take(list, place, message, id)
  local looked = redis.call('HGET', KEYS[6], list) == message
  redis.call('LREM', list, -1, message)
  if looked then -- the one before it takes its part
    local before = redis.call('LINDEX', list, place)
    if before then redis.call('HSET', KEYS[6], list, before) else redis.call('HDEL', KEYS[6], list) end
  end
  local tenant = removed(list, message)
  local lease = string.format('%d-%s', redis.call('INCR', KEYS[3]), ARGV[2])
  if tenant ~= '' then
    lease = lease .. '/' .. tenant
    redis.call('HINCRBY', KEYS[4], tenant, 1)
  end
  local stored = list .. '\n' .. message
  redis.call('HSET', KEYS[2], lease, stored)
  redis.call('ZADD', KEYS[1], now + ARGV[1], lease)
  redis.call('ZREM', KEYS[5], id .. '\n' .. list)
  out[#out + 1] = lease
  out[#out + 1] = string.format('%d', wanted[list][id])
  out[#out + 1] = stored
end

local seen, bytes = 0, 0
for _, list in ipairs(lists) do
  local ids, place, page = wanted[list], redis.call('LLEN', list) - 1, 8
  if list == ARGV[4] then place = math.min(place, tonumber(ARGV[5])) end
  while place >= 0 and next(ids) and seen < LOOKED_AT and bytes < BYTES do
    local first, size = math.max(0, place - page + 1), 0
    local messages = redis.call('LRANGE', list, first, place)
    for i = #messages, 1, -1 do
      size = size + #messages[i]
      local id = id_of(messages[i])
      if id and ids[id] then
        take(list, first + i - 1, messages[i], id)
        ids[id] = nil
      end
    end
    seen, bytes, place = seen + #messages, bytes + size, first - 1
    page = math.max(1, math.min(128, math.floor(page * PAGE_BYTES / math.max(1, size))))
  end
  if place >= 0 and next(ids) then
    out[1], out[3], out[4] = 0, list, place
    return out
  end
  for id, deadline in pairs(ids) do
    if deadline < now - FORGOTTEN then redis.call('ZREM', KEYS[5], id .. '\n' .. list) end
  end
end
if #late == 2 * MOST and #out > 4 then
  out[1] = 0
else
  local following = redis.call('ZRANGEBYSCORE', KEYS[5], '(' .. now - ARGV[3], '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
  if following then out[1] = math.max(1, following + ARGV[3] - now) end
end
return out
