-- Which leases were made by claims whose answers did not come?
--
-- KEYS[1]  muai:lease:index  zset lease id -> expiry, ms
-- ARGV[1]  lease length, ms
-- ARGV[2+] the claims' tokens
-- Returns  the leases
local asked, found = {}, {}
for i = 2, #ARGV do asked[ARGV[i]] = true end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, lease in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now, now + ARGV[1])) do
  if asked[string.match(lease, '^%d+%-(%x+)')] then found[#found + 1] = lease end
end
return found
