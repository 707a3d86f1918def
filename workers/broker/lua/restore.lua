--!include lists
-- Push requests again that were thought to be under way and are nowhere, each unless it has come again or ended meanwhile.
--
-- KEYS[1]  muai:doubted   hash request id -> list, newline, message
-- KEYS[2]  muai:underway  zset request id -> when it was submitted, ms
-- KEYS[3]  muai:doubting  who looks
-- ARGV     for each request three arguments: its id, when it was submitted, 1 where it is nowhere, 0 where it was found
-- Returns  the ids that were pushed
redis.call('PERSIST', KEYS[2]) -- a full broker refuses a script's first write, unless it is one that needs no room
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local pushed = {}
for i = 1, #ARGV, 3 do
  local id, stored = ARGV[i], redis.call('HGET', KEYS[1], ARGV[i])
  if stored and ARGV[i + 2] == '1' and redis.call('ZSCORE', KEYS[2], id) == ARGV[i + 1]
    and redis.call('EXISTS', 'celery-task-meta-' .. id) == 0 then
    local cut = string.find(stored, '\n', 1, true)
    push(string.sub(stored, 1, cut - 1), 'L', { string.sub(stored, cut + 1) }, true)
    redis.call('ZADD', KEYS[2], now, id)
    pushed[#pushed + 1] = id
  end
  redis.call('HDEL', KEYS[1], id)
end
redis.call('DEL', KEYS[3])
return pushed
