-- The requests that are to be looked for, by one worker at a time.
--
-- KEYS[1]  muai:doubted   hash request id -> list, newline, message
-- KEYS[2]  muai:underway  zset request id -> when it was submitted, ms
-- KEYS[3]  muai:doubting  who looks
-- ARGV[1]  who asks
-- ARGV[2]  ms for which nobody else is to look
-- ARGV[3]  about how many requests
-- Returns  { id, when it was submitted ('' where it is not under way any longer), ... }; nothing where another looks
redis.call('PERSIST', KEYS[2]) -- a full broker refuses a script's first write, unless it is one that needs no room
if redis.call('EXISTS', KEYS[1]) == 0 or not redis.call('SET', KEYS[3], ARGV[1], 'NX', 'PX', ARGV[2]) then return {} end
local page, out = redis.call('HSCAN', KEYS[1], 0, 'COUNT', ARGV[3])[2], {}
for i = 1, #page, 2 do
  out[#out + 1] = page[i]
  out[#out + 1] = redis.call('ZSCORE', KEYS[2], page[i]) or ''
end
return out
