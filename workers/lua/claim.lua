-- Move up to N messages from the lists of one queue to leases, the most urgent list first.
--
-- KEYS[1]   muai:lease:index     zset lease id -> expiry, ms
-- KEYS[2]   muai:lease:messages  hash lease id -> list name, newline, message
-- KEYS[3]   muai:lease:next      counter
-- KEYS[4]   muai:cancelled       zset result key -> time of cancellation
-- KEYS[5+]  the queue's lists, most urgent first (producers LPUSH, so the oldest message is on the right)
-- ARGV[1]   most messages to move
-- ARGV[2]   lease length, ms
-- Returns   { now in ms, messages still waiting, cancelled requests, lease id, message, lease id, message, ... }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expiry = now + ARGV[2]
local wanted = tonumber(ARGV[1])
local waiting = 0
local out = { now, 0, redis.call('ZCARD', KEYS[4]) }
for i = 5, #KEYS do
  local list = KEYS[i]
  if wanted > 0 then
    local messages = redis.call('RPOP', list, wanted)
    if messages then
      local lease = redis.call('INCRBY', KEYS[3], #messages) - #messages
      for _, message in ipairs(messages) do
        lease = lease + 1
        local id = string.format('%d', lease)
        redis.call('HSET', KEYS[2], id, list .. '\n' .. message)
        redis.call('ZADD', KEYS[1], expiry, id)
        out[#out + 1] = id
        out[#out + 1] = message
      end
      wanted = wanted - #messages
    end
  end
  waiting = waiting + redis.call('LLEN', list)
end
out[2] = waiting
return out
