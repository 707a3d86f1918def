-- Let leases expire now: their holder is gone. Who sweeps next takes them over.
--
-- KEYS[1]  muai:lease:index  zset lease id -> expiry, ms
-- ARGV     leases
-- Returns  how many of them were held
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = 0
for _, lease in ipairs(ARGV) do
  if redis.call('ZSCORE', KEYS[1], lease) then
    redis.call('ZADD', KEYS[1], 'LT', now, lease)
    held = held + 1
  end
end
return held
