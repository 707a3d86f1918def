-- Cancel a request: write its terminal record, unless it has one. Without the second key: end one that nobody has. Who claims
-- the request later than the record is kept still knows: a cancellation is kept for longer, and goes when the request has ended.
--
-- KEYS[1]  result key
-- KEYS[2]  muai:cancelled  zset result key -> time of cancellation, ms
-- ARGV[1]  result record
-- ARGV[2]  seconds that results are kept
-- ARGV[3]  seconds that cancellations are kept
-- Returns  1, or 0 where the request had ended before
local existing = redis.pcall('GET', KEYS[1]) -- an error where the key is no text: then it is overwritten
if existing then
  local ok, record = pcall(cjson.decode, existing)
  local status = ok and type(record) == 'table' and record.status
  if status == 'SUCCESS' or status == 'FAILURE' or status == 'REVOKED' then return 0 end
end
if not KEYS[2] then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
  redis.call('PUBLISH', KEYS[1], ARGV[1])
  return 1
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- The removal comes first: a broker that is out of memory lets a script write on once it has written something that
-- takes none.
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[3] * 1000)
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
redis.call('PUBLISH', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], now, KEYS[1])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
