-- Keep leases. One that is no longer held stays lost.
--
-- KEYS[1]  muai:lease:index  zset lease id -> expiry, ms
-- ARGV[1]  lease length, ms
-- ARGV[2+] lease id and the ms since the epoch past which it is not to be kept (0: no such time), in turn
-- Returns  the leases that are lost
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lost = {}
for i = 2, #ARGV, 2 do
  local lease, last = ARGV[i], tonumber(ARGV[i + 1])
  local expiry = now + ARGV[1]
  if last > 0 and last < expiry then expiry = last end
  if redis.call('ZADD', KEYS[1], 'XX', 'CH', expiry, lease) == 0 and not redis.call('ZSCORE', KEYS[1], lease) then
    lost[#lost + 1] = lease
  end
end
return lost
