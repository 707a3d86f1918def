-- Which of these requests are among the messages of one page of a list, or of one page of the leases?
--
-- KEYS[1]   a list, or muai:lease:messages
-- ARGV[1]   list or leases
-- ARGV[2]   where the page begins: 0, or what the page before returned
-- ARGV[3]   messages of a page, about as many of the leases
-- ARGV[4+]  ids as they stand in a message, in JSON without the quotes; an id may be there in several spellings
-- Returns   { where the next page begins (0: this was the last), ids that were found }
--
-- A list grows on the left and shrinks on the right, so pages from the left show a message that stays at least once.
local wanted, found = {}, {}
for i = 4, #ARGV do wanted[ARGV[i]] = true end

local function look(message)
  local id = string.match(message, '"id":%s?"([^"]*)"')
  if id and wanted[id] then found[#found + 1] = id end
end

if ARGV[1] == 'leases' then
  local next, page = unpack(redis.call('HSCAN', KEYS[1], ARGV[2], 'COUNT', ARGV[3]))
  for i = 2, #page, 2 do look(page[i]) end
  return { next, found }
end
local first, size = tonumber(ARGV[2]), tonumber(ARGV[3])
local page = redis.call('LRANGE', KEYS[1], first, first + size - 1)
for _, message in ipairs(page) do look(message) end
return { #page == size and string.format('%d', first + size) or '0', found }
