-- The secret of a fleet's workers, made by whoever asks first.
--
-- KEYS[1]  muai:seal  when it was made, ms, a colon, and the secret
-- ARGV[1]  the secret, should there be none
-- Returns  what is there
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local seal = redis.call('GET', KEYS[1])
if not seal then
  local time = redis.call('TIME')
  seal = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000)) .. ':' .. ARGV[1]
  redis.call('SET', KEYS[1], seal)
end
return seal
