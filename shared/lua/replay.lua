--!include lists
-- Put dead letters back on the queues they came from, each with its removal, all or nothing per letter.
--
-- The record that told its caller of the failure goes as well: the first terminal record of a request stands, and the
-- request is to have another.
--
-- KEYS[1]  muai:dead      stream of dead letters
-- KEYS[2]  muai:underway  zset request id -> when it was submitted, ms
-- ARGV     for each letter four arguments: its id, the list, the message, the result key (empty where there is none)
-- Returns  one 1 or 0 a letter: 0 where somebody else was faster
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local moved = {}
for i = 1, #ARGV, 4 do
  local id, list, message, result = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local there = redis.call('XDEL', KEYS[1], id)
  if there == 1 then
    if result ~= '' then
      redis.call('DEL', result)
      redis.call('ZADD', KEYS[2], now, string.sub(result, #'celery-task-meta-' + 1))
    end
    push(list, 'L', { message })
  end
  moved[#moved + 1] = there
end
return moved
