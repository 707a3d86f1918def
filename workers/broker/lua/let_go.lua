-- Let the leases of a process expire now, for it is dead. Who sweeps next takes them over.
--
-- KEYS[1]  muai:lease:index  zset lease id -> expiry, ms
-- ARGV[1]  what the tokens of its leases begin with
-- ARGV[2]  lease length, ms
-- Returns  how many there were
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count = 0
for _, lease in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now, now + ARGV[2])) do
  local token = string.match(lease, '^%d+%-(%x+)')
  if token and string.sub(token, 1, #ARGV[1]) == ARGV[1] then
    redis.call('ZADD', KEYS[1], now, lease)
    count = count + 1
  end
end
return count
