-- Who has which GPU, and which are marked. Nothing is changed.
--
-- KEYS[1]  muai:gpu:leases   zset uuid -> expiry, ms
-- KEYS[2]  muai:gpu:holders  hash uuid -> fence, newline, holder (JSON)
-- KEYS[3]  muai:gpu:marked   zset uuid -> end of the mark, ms
-- KEYS[4]  muai:gpu:marks    hash uuid -> reason
-- Returns  { { uuid, ms left, holder (JSON), ... }, { uuid, ms left, reason, ... } }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function rows(zset, hash)
  local out = {}
  local found = redis.call('ZRANGEBYSCORE', zset, '(' .. now, '+inf', 'WITHSCORES')
  for i = 1, #found, 2 do
    out[#out + 1] = found[i]
    out[#out + 1] = found[i + 1] - now
    out[#out + 1] = redis.call('HGET', hash, found[i]) or ''
  end
  return out
end

local leases = rows(KEYS[1], KEYS[2])
for i = 3, #leases, 3 do
  leases[i] = string.sub(leases[i], (string.find(leases[i], '\n', 1, true) or 0) + 1)
end
return { leases, rows(KEYS[3], KEYS[4]) }
