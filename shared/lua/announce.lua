-- A worker says that it lives.
--
-- KEYS[1]  muai:workers:seen   zset worker id -> last announcement, ms
-- KEYS[2]  muai:workers:info   hash worker id -> JSON
-- KEYS[3]  muai:workers:more   hash worker id -> JSON: what readers of 0.1.0 would refuse
-- ARGV[1]  worker id
-- ARGV[2]  what it announces, JSON; empty: the worker leaves
-- ARGV[3]  ms of silence after which a worker is dropped
-- ARGV[4]  what else it announces, JSON
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[2] == '' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
  redis.call('HDEL', KEYS[3], ARGV[1])
else
  redis.call('ZADD', KEYS[1], now, ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
  redis.call('HSET', KEYS[3], ARGV[1], ARGV[4])
end
local silent = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. (now - ARGV[3]), 'LIMIT', 0, 100)
for _, worker in ipairs(silent) do
  redis.call('ZREM', KEYS[1], worker)
  redis.call('HDEL', KEYS[2], worker)
  redis.call('HDEL', KEYS[3], worker)
end
return #silent
