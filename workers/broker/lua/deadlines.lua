-- Note until when requests are wanted, of which only their senders knew. What was noted before stands.
--
-- KEYS[1]  muai:deadlines  zset request id, newline, list -> its deadline, ms
-- ARGV     for each request its id, newline, list, and its deadline
-- Returns  the deadlines that stand
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local out = {}
for i = 1, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 'NX', ARGV[i + 1], ARGV[i])
  out[#out + 1] = redis.call('ZSCORE', KEYS[1], ARGV[i])
end
return out
