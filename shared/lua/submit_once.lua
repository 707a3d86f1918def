-- Push requests whose ids their senders chose, each unless one of that id is under way or has its answer.
--
-- KEYS     for each request three: muai:submitted:<id>, its result key, the list
-- ARGV[1]  seconds that a submission is remembered (as long as results are kept)
-- ARGV[2+] for each request its message
-- Returns  one 1 or 0 a request: 0 where it was there before
local pushed = {}
for i = 2, #ARGV do
  local at = (i - 2) * 3
  local mark, result, list = KEYS[at + 1], KEYS[at + 2], KEYS[at + 3]
  if redis.call('EXISTS', result) == 1 or not redis.call('SET', mark, '1', 'NX', 'EX', ARGV[1]) then
    pushed[#pushed + 1] = 0
  else
    redis.call('LPUSH', list, ARGV[i])
    pushed[#pushed + 1] = 1
  end
end
return pushed
