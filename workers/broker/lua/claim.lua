--!include lists
-- Move up to N messages from the lists of one queue to leases.
--
-- The most urgent step goes first, with a bound: where a step was passed over for ARGV[3] more urgent messages, one of its own
-- is next. Inside a step the tenants' lanes and the shared list take turns, each by its weight; a tenant that has its share
-- of what is in flight is left out until one of its requests has ended. Of a tenant's lanes the one that is meant for who
-- claims goes first, then its common one, then those that were not served by whom they are meant for in the time given.
--
-- KEYS[1]   muai:lease:index     zset lease id -> expiry, ms
-- KEYS[2]   muai:lease:messages  hash lease id -> list name, newline, message
-- KEYS[3]   muai:lease:next      counter
-- KEYS[4]   muai:cancelled       zset result key -> time of cancellation
-- KEYS[5]   muai:queue:<queue>   what is known of the queue, see lists.lua
-- KEYS[6]   muai:inflight        hash tenant -> leases of messages from its lanes
-- KEYS[7+]  the queue's shared lists, most urgent first (producers LPUSH, so the oldest message is on the right), then for
--           each of them muai:lanes:<list>, which tenants have lanes there
-- ARGV[1]   most messages to move
-- ARGV[2]   lease length, ms
-- ARGV[3]   more urgent messages that may pass a waiting one
-- ARGV[4]   quotas, JSON: tenant -> [weight, most in flight (0: any number)]; '*' is everybody who is not named; '' is none
-- ARGV[5]   the affinity of who claims; '' is none
-- ARGV[6]   ms that a lane waits for the worker it is meant for
-- ARGV[7]   what makes the ids of this claim's leases unlike all others, should the broker have lost its last writes
-- Returns   { now in ms (0 where there was nothing), 1 where more waits that may be claimed, tenants that were left out,
--             when a request was cancelled last in ms (0: none is), lease id, message, lease id, message, ... }
--
-- A connection that tracks what it reads is told when a list changes that it found empty: each claim begins with a look at
-- all of them, and ends with another one, since the broker forgets who has read what the same connection then changes. Many
-- workers may wait for one message, so the look of those that come too late is cheap.
local there = redis.call('EXISTS', KEYS[4], unpack(KEYS, 7))
if there == 0 then return { 0, 0, 0, 0 } end
local newest, cancelled = redis.call('ZRANGE', KEYS[4], -1, -1, 'WITHSCORES'), 0
if newest[2] then there, cancelled = there - 1, tonumber(newest[2]) end
if there == 0 then return { 0, 0, 0, cancelled } end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expiry = now + ARGV[2]
local limit, patience = tonumber(ARGV[1]), tonumber(ARGV[3])
local quotas = ARGV[4] ~= '' and cjson.decode(ARGV[4]) or {}
local mine, courtesy = ARGV[5], tonumber(ARGV[6])
local out = { now, 0, 0, cancelled }
local taken, bytes, laned = 0, 0, 0

local function lease(list, tenant, messages)
  if #messages == 0 then return 0 end
  local last = redis.call('INCRBY', KEYS[3], #messages) - #messages
  local stored, scores = {}, {}
  for i, message in ipairs(messages) do
    local id = string.format('%d-%s', last + i, ARGV[7])
    if tenant ~= '' then id = id .. '/' .. tenant end
    stored[2 * i - 1], stored[2 * i] = id, list .. '\n' .. message
    scores[2 * i - 1], scores[2 * i] = expiry, id
    out[#out + 1] = id
    out[#out + 1] = message
    bytes = bytes + #message
  end
  redis.call('HSET', KEYS[2], unpack(stored))
  redis.call('ZADD', KEYS[1], unpack(scores))
  taken = taken + #messages
  if string.sub(list, 1, 10) == 'muai:lane:' then laned = laned + #messages end
  if tenant ~= '' then redis.call('HINCRBY', KEYS[6], tenant, #messages) end
  return #messages
end

local function quota(tenant)
  return quotas[tenant] or quotas['*'] or { 1, 0 }
end

-- How many more of a tenant's requests may be in flight.
local function free(tenant)
  local most = quota(tenant)[2]
  if most == 0 then return limit end
  return math.max(0, most - (tonumber(redis.call('HGET', KEYS[6], tenant)) or 0))
end

-- Which of a tenant's lanes is next, by its affinity (nil: the common one); false where all are meant for others.
local function next_lane(shared, tenant)
  local lanes = affine_lanes(shared, tenant)
  if redis.call('EXISTS', lanes) == 0 then return nil end
  if mine ~= '' and redis.call('HEXISTS', lanes, mine) == 1 then return mine end
  if redis.call('LLEN', lane_of(shared, tenant)) > 0 then return nil end
  local oldest, found = now - courtesy, false
  local known = redis.call('HGETALL', lanes)
  for i = 1, #known, 2 do
    local since = tonumber(known[i + 1])
    if since <= oldest then oldest, found = since, known[i] end
  end
  return found
end

-- Take one message of a lane.
local function serve(zset, shared, tenant, affinity)
  local list, lanes = lane_of(shared, tenant, affinity), affine_lanes(shared, tenant)
  local message = redis.call('RPOP', list)
  if message then lease(list, tenant, { message }) end
  redis.call('ZINCRBY', zset, 1 / quota(tenant)[1], tenant)
  local empty = redis.call('LLEN', list) == 0
  if affinity and empty then
    redis.call('HDEL', lanes, affinity)
    empty = redis.call('LLEN', lane_of(shared, tenant)) == 0
  elseif affinity then
    redis.call('HSET', lanes, affinity, now)
  end
  if empty and redis.call('EXISTS', lanes) == 0 then redis.call('ZREM', zset, tenant) end
end

-- Take up to n messages of one step, in turns.
local function take(step, n)
  local shared, zset = step.list, 'muai:lanes:' .. step.list
  if step.lanes == 1 and redis.call('EXISTS', affine_lanes(shared, '')) == 0 and redis.call('ZREM', zset, '') == 1 then
    step.lanes = 0
  end
  if step.lanes == 0 then return lease(shared, '', redis.call('RPOP', shared, n) or {}) end
  redis.call('PERSIST', KEYS[1]) -- a full broker refuses a script's first write, unless it is one that needs no room
  local turn = tonumber(redis.call('HGET', KEYS[5], 'turn:' .. shared)) or 0
  if redis.call('LLEN', shared) > 0 then redis.call('ZADD', zset, 'NX', turn + 1, '') end
  local before, skipped = taken, 0
  while taken - before < n do
    local tenant, score = unpack(redis.call('ZRANGE', zset, skipped, skipped, 'WITHSCORES'))
    if not tenant then break end
    local affinity = next_lane(shared, tenant)
    if affinity == false or tenant ~= '' and free(tenant) == 0 then
      skipped = skipped + 1 -- it stays in front: it has had the least
    else
      serve(zset, shared, tenant, affinity)
      turn = math.max(turn, tonumber(score))
    end
  end
  out[3] = out[3] + skipped
  if taken > before then redis.call('HSET', KEYS[5], 'turn:' .. shared, turn) end
  step.lanes = redis.call('ZCARD', zset)
  return taken - before
end

local steps, busy, count = {}, 0, (#KEYS - 6) / 2
for i = 1, count do steps[i] = { list = KEYS[6 + i], lanes = 0, open = false } end
for i = 1, 2 * count do
  if there == 0 then break end -- the others hold nothing
  local step, shared = steps[(i - 1) % count + 1], i <= count
  local held = redis.call(shared and 'LLEN' or 'ZCARD', KEYS[6 + i])
  if held > 0 then
    there = there - 1
    if not shared then step.lanes = held end
    if not step.open then step.open, busy = true, busy + 1 end
  end
end

if busy == 1 then
  for _, step in ipairs(steps) do
    if step.open then take(step, limit) end
  end
elseif busy > 1 then
  for i = 2, #steps do
    steps[i].passed = tonumber(redis.call('HGET', KEYS[5], 'passed' .. i)) or 0
  end
  while taken < limit do
    local turn, impatient
    local n = limit - taken
    for i = #steps, 1, -1 do
      if steps[i].open then
        turn = i
        if i > 1 and steps[i].passed >= patience then
          impatient = true
          n = 1
          break
        end
      end
    end
    if not turn then break end
    if not impatient then
      for i = turn + 1, #steps do
        if steps[i].open then n = math.min(n, patience - steps[i].passed) end
      end
    end
    local got = take(steps[turn], n)
    if got < n then steps[turn].open = false end
    if turn > 1 then steps[turn].passed = 0 end
    for i = turn + 1, #steps do
      if steps[i].open and not impatient then steps[i].passed = steps[i].passed + got end
    end
  end
  for i = 2, #steps do
    redis.call('HSET', KEYS[5], 'passed' .. i, steps[i].open and steps[i].passed or 0)
  end
end

if redis.call('EXISTS', unpack(KEYS, 7)) > 0 and taken == limit then out[2] = 1 end
if out[3] > 0 then redis.call('EXISTS', KEYS[6]) end -- so that it is told when one of the tenants' requests has ended

local state = taken > 0 and redis.call('HMGET', KEYS[5], 'bytes', 'at', 'taken', 'rate')
if state and state[1] then -- not for the queues of Celery's own
  local size, at, count, rate = tonumber(state[1]) or 0, tonumber(state[2]) or 0, tonumber(state[3]) or 0, tonumber(state[4])
  count = count + taken
  if now - at > 5000 then -- nothing was taken for a while: that was no measurement
    at, count = now, 0
  elseif now - at >= 500 then
    local measured = 1000 * count / (now - at)
    rate = rate and 0.7 * rate + 0.3 * measured or measured
    at, count = now, 0
  end
  -- What others have pushed was not counted: an empty queue is where both agree again.
  size = (taken < limit and out[3] == 0) and 0 or math.max(0, size - bytes)
  redis.call('HSET', KEYS[5], 'bytes', size, 'at', at, 'taken', count, 'rate', rate or 0)
  if laned > 0 then redis.call('HINCRBY', KEYS[5], 'laned', -laned) end
end
return out
