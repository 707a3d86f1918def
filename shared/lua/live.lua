-- The workers that have announced themselves lately.
--
-- KEYS[1]  muai:workers:seen   zset worker id -> last announcement, ms
-- KEYS[2]  muai:workers:info   hash worker id -> JSON
-- KEYS[3]  muai:workers:more   hash worker id -> JSON, of workers after 0.1.0
-- ARGV[1]  ms of silence after which a worker does not count
-- Returns  { ms since its announcement, JSON, the other JSON or '', ... }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local seen = redis.call('ZRANGEBYSCORE', KEYS[1], now - ARGV[1], '+inf', 'WITHSCORES')
local out = {}
for i = 1, #seen, 2 do
  local info = redis.call('HGET', KEYS[2], seen[i])
  if info then
    out[#out + 1] = now - seen[i + 1]
    out[#out + 1] = info
    out[#out + 1] = redis.call('HGET', KEYS[3], seen[i]) or ''
  end
end
return out
