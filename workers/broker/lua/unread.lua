-- What others than our client have put on lists since the last look: nobody but who reads it knows when it is late.
--
-- A list is read from the end at which it is claimed. What has been read is remembered by the last of it: where that was
-- claimed, so was all that came before it.
--
-- KEYS[1]   muai:looked  hash list -> the last message that was looked at
-- KEYS[2+]  lists
-- ARGV[1]   most messages to return
-- Returns   { 1 where there is more to be looked at, list, message, list, message, ... }
local LOOKED_AT, BYTES, PAGE_BYTES, MEMORY = 2000, 4194304, 262144, 600
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
if redis.call('EXISTS', unpack(KEYS, 2)) == 0 then
  redis.call('DEL', KEYS[1])
  return { 0 }
end
local out, most = { 0 }, 1 + 2 * ARGV[1]
local seen, bytes = 0, 0
for i = 2, #KEYS do
  local list = KEYS[i]
  local place, page, newest = redis.call('LLEN', list) - 1, 8, nil
  local last = redis.call('HGET', KEYS[1], list)
  if place < 0 then
    if last then redis.call('HDEL', KEYS[1], list) end
  elseif last then
    place = (redis.call('LPOS', list, last) or place + 1) - 1
  end
  while place >= 0 and seen < LOOKED_AT and bytes < BYTES and #out < most do
    local first, size = math.max(0, place - page + 1), 0
    local messages = redis.call('LRANGE', list, first, place)
    for n = #messages, 1, -1 do
      if #out >= most then break end
      newest, place, size = messages[n], place - 1, size + #messages[n]
      if not string.find(newest, '"muai":{"v"', 1, true) then
        out[#out + 1] = list
        out[#out + 1] = newest
      end
    end
    seen, bytes = seen + #messages, bytes + size
    page = math.max(1, math.min(128, math.floor(page * PAGE_BYTES / math.max(1, size))))
  end
  if newest then redis.call('HSET', KEYS[1], list, newest) end
  if place >= 0 then out[1] = 1 end
end
redis.call('EXPIRE', KEYS[1], MEMORY)
return out
