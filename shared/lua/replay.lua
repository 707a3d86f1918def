--!include lists
-- Put dead letters back on the queues they came from, each with its removal, all or nothing per letter.
--
-- The record that told its caller of the failure goes as well: the first terminal record of a request stands, and the
-- request is to have another.
--
-- KEYS[1]  muai:dead  stream of dead letters
-- ARGV[1]  seconds that a submission is remembered, should nobody ever answer it
-- then for each letter four arguments: its id, the list, the message, the result key (empty where there is none)
-- Returns  one 1 or 0 a letter: 0 where somebody else was faster
local moved = {}
for i = 2, #ARGV, 4 do
  local id, list, message, result = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local there = redis.call('XDEL', KEYS[1], id)
  if there == 1 then
    if result ~= '' then
      redis.call('DEL', result)
      redis.call('SET', 'muai:submitted:' .. string.sub(result, #'celery-task-meta-' + 1), '1', 'EX', ARGV[1])
    end
    push(list, 'L', { message })
  end
  moved[#moved + 1] = there
end
return moved
