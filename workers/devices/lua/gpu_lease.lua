-- GPUs are leased before CUDA is touched. All or none of a lease's GPUs, never one that somebody else holds.
--
-- A GPU is free where no lease of it is there that has not expired. A fence is unique to its lease: what another lease
-- holds under the same uuid is never renewed or released by it.
--
-- KEYS[1]  muai:gpu:leases   zset uuid -> expiry, ms
-- KEYS[2]  muai:gpu:holders  hash uuid -> fence, newline, holder (JSON)
-- KEYS[3]  muai:gpu:marked   zset uuid -> end of the mark, ms
-- KEYS[4]  muai:gpu:marks    hash uuid -> reason
-- ARGV[1]  acquire, renew, release or mark
--
-- acquire  ARGV[2] fence, [3] holder (JSON), [4] lease length, ms, [5] how many, [6+] candidates, the best first
--          Returns the uuids that were leased; none: too few are free, and nothing was changed
-- renew    ARGV[2] fence, [3] holder (JSON), [4] lease length, ms, [5+] uuids
--          Returns the uuids that are lost; where one is, the lease's others were released
-- release  ARGV[2] fence, [3+] uuids
--          Returns the uuids that were released
-- mark     ARGV[2] reason, [3] how long, ms, [4+] uuids
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local verb = ARGV[1]

local function forget(zset, hash, uuid)
  redis.call('ZREM', zset, uuid)
  redis.call('HDEL', hash, uuid)
end

local function holder_fence(uuid)
  local stored = redis.call('HGET', KEYS[2], uuid)
  return stored and string.sub(stored, 1, (string.find(stored, '\n', 1, true) or 0) - 1)
end

local function give(uuid, fence, holder, length)
  redis.call('ZADD', KEYS[1], now + length, uuid)
  redis.call('HSET', KEYS[2], uuid, fence .. '\n' .. holder)
end

local function release(fence, uuids)
  local out = {}
  for _, uuid in ipairs(uuids) do
    if holder_fence(uuid) == fence then
      forget(KEYS[1], KEYS[2], uuid)
      out[#out + 1] = uuid
    end
  end
  return out
end

local function rest(first)
  local out = {}
  for i = first, #ARGV do out[#out + 1] = ARGV[i] end
  return out
end

-- Whoever died with a lease is forgotten by those who come after.
for _, uuid in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do forget(KEYS[1], KEYS[2], uuid) end
for _, uuid in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do forget(KEYS[3], KEYS[4], uuid) end

if verb == 'acquire' then
  local count, free = tonumber(ARGV[5]), {}
  for _, uuid in ipairs(rest(6)) do
    if #free < count and not redis.call('ZSCORE', KEYS[1], uuid) and not redis.call('ZSCORE', KEYS[3], uuid) then
      free[#free + 1] = uuid
    end
  end
  if #free < count then return {} end
  for _, uuid in ipairs(free) do give(uuid, ARGV[2], ARGV[3], ARGV[4]) end
  return free
elseif verb == 'renew' then
  local fence, uuids, lost = ARGV[2], rest(5), {}
  for _, uuid in ipairs(uuids) do
    -- A lease that is gone without a successor is taken up again: its holder was silent, or the broker lost its data.
    local held = redis.call('ZSCORE', KEYS[1], uuid)
    if held and holder_fence(uuid) ~= fence then lost[#lost + 1] = uuid end
  end
  if #lost > 0 then
    release(fence, uuids)
  else
    for _, uuid in ipairs(uuids) do give(uuid, fence, ARGV[3], ARGV[4]) end
  end
  return lost
elseif verb == 'release' then
  return release(ARGV[2], rest(3))
elseif verb == 'mark' then
  for _, uuid in ipairs(rest(4)) do
    redis.call('ZADD', KEYS[3], 'GT', now + ARGV[3], uuid)
    redis.call('HSET', KEYS[4], uuid, ARGV[2])
  end
  return {}
end
return redis.error_reply('gpu_lease: no such verb')
