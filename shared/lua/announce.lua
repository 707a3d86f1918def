--!include roster
-- A worker says that it lives, and learns who else does; or it leaves. What changes is kept, so that it alone is read.
--
-- KEYS[1-5]  see roster.lua
-- ARGV[1]    worker id
-- ARGV[2]    what it announces, JSON; empty: the worker leaves
-- ARGV[3]    ms of silence after which a worker is dropped
-- ARGV[4]    what else it announces, JSON
-- ARGV[5]    digest of what of it lasts
-- ARGV[6]    ms that a change is kept
-- ARGV[7]    a stamp: what has changed since then is wanted; empty: all
-- Returns    see roster.lua; nothing where it leaves
redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
local silence = now - ARGV[3]

local function changed(worker, digest)
  redis.call('HSET', KEYS[4], worker, digest)
  redis.call('ZADD', KEYS[5], now, worker)
end

local function drop(worker)
  redis.call('ZREM', KEYS[1], worker)
  for i = 2, 4 do redis.call('HDEL', KEYS[i], worker) end
  redis.call('ZADD', KEYS[5], now, worker)
end

-- For all of them: one of those that announce themselves does it, twice a second.
local function look_after_all()
  local ago = now - tonumber(redis.call('HGET', KEYS[4], '') or 0)
  if ago >= 0 and ago < 500 then return end
  redis.call('HSET', KEYS[4], '', now)
  redis.call('HSETNX', KEYS[4], '.', now)
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. silence, 'LIMIT', 0, 100)) do drop(worker) end
  if redis.call('ZCARD', KEYS[1]) ~= redis.call('HLEN', KEYS[4]) - 2 then -- workers of 0.1.0 come and go without a word
    for _, worker in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
      if redis.call('HEXISTS', KEYS[4], worker) == 0 then changed(worker, '0.1.0') end
    end
    for _, worker in ipairs(redis.call('HKEYS', KEYS[4])) do
      if worker ~= '' and worker ~= '.' and not redis.call('ZSCORE', KEYS[1], worker) then drop(worker) end
    end
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now - ARGV[6])
end

if ARGV[2] == '' then
  drop(ARGV[1])
  return
end
local last = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[4])
if last < silence or redis.call('HGET', KEYS[4], ARGV[1]) ~= ARGV[5] then changed(ARGV[1], ARGV[5]) end
look_after_all()
return changes(silence, ARGV[7])
