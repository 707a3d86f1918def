--!include lists
-- Push new requests, all of them or none: each id once, no queue past its capacity, no tenant past its rate.
--
-- An id that is under way, or has its answer, is not pushed again. A queue is full at its capacity, by number or by bytes;
-- a tenant with less than an equal share of the capacity waiting is let in all the same, so that nobody can fill a queue
-- against the others: what waits stays under twice the capacity.
--
-- KEYS[1]   muai:underway  zset request id -> when it was submitted, ms
-- ARGV[1]   seconds that a submission is remembered, should nobody ever answer it
-- ARGV[2]   capacity of a queue, messages
-- ARGV[3]   capacity of a queue, bytes
-- ARGV[4+]  for each list: the list; requests a second that its tenant may submit (0: any number) and how many at once;
--           the number of its requests, at most 1000; for each of them its id and its message
-- Returns   { 'ok', one 1 or 0 a request: 0 where it was known }
--           { 'full', queue, messages waiting, ms until there is room (-1: unknown) }
--           { 'rate', tenant, ms until it may }
local ttl, capacity, most_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local groups, at = {}, 4
while at <= #ARGV do
  local list, count = ARGV[at], tonumber(ARGV[at + 3])
  local queue, tenant = parts(list)
  groups[#groups + 1] = { list = list, queue = queue, tenant = tenant, first = at + 4, last = at + 2 + 2 * count,
                          rate = tonumber(ARGV[at + 1]), burst = tonumber(ARGV[at + 2]) }
  at = at + 4 + 2 * count
end

-- Which of a group's requests are new, as places of their ids in ARGV; asked once, of all of them together.
local seen = {}
local function news(group)
  if group.news then return group.news end
  local ids, results = {}, {}
  for i = group.first, group.last, 2 do
    ids[#ids + 1] = ARGV[i]
    results[#results + 1] = 'celery-task-meta-' .. ARGV[i]
  end
  local under_way = redis.call('ZMSCORE', KEYS[1], unpack(ids))
  local answered = redis.call('EXISTS', unpack(results)) > 0
  local found = {}
  for n, id in ipairs(ids) do
    if not (under_way[n] or seen[id] or answered and redis.call('EXISTS', results[n]) == 1) then
      found[#found + 1] = group.first + 2 * (n - 1)
    end
    seen[id] = true
  end
  group.news = found
  return found
end

local steps = { '', '\6\0223', '\6\0226', '\6\0229' }

local function length(queue, tenant)
  local total = 0
  for _, step in ipairs(steps) do
    total = total + redis.call('LLEN', lane_of(queue .. step, tenant))
    for _, affinity in ipairs(redis.call('HKEYS', affine_lanes(queue .. step, tenant))) do
      total = total + redis.call('LLEN', lane_of(queue .. step, tenant, affinity))
    end
  end
  return total
end

local function sharers(queue)
  local count = 1
  for _, step in ipairs(steps) do
    local lanes = 'muai:lanes:' .. queue .. step
    count = count + redis.call('ZCARD', lanes) - (redis.call('ZSCORE', lanes, '') and 1 or 0)
  end
  return count
end

-- 1. Is there room? What this call itself adds is counted by queue.
local adds = {}
for _, group in ipairs(groups) do
  local queue = group.queue
  local state_of = adds[queue]
  if not state_of then
    local known = redis.call('HMGET', 'muai:queue:' .. queue, 'laned', 'bytes', 'rate')
    state_of = { waiting = length(queue, '') + (tonumber(known[1]) or 0), bytes = tonumber(known[2]) or 0, rate = tonumber(known[3]) }
    if state_of.waiting == 0 then state_of.bytes = 0 end
    adds[queue] = state_of
  end
  local count, bytes = 0, 0
  for _, i in ipairs(news(group)) do count, bytes = count + 1, bytes + #ARGV[i + 1] end
  if count > 0 and (state_of.waiting + count > capacity or state_of.bytes + bytes > most_bytes) then
    local share = capacity / sharers(queue)
    local over = math.max(state_of.waiting + count - capacity, (state_of.bytes + bytes - most_bytes) / math.max(1, state_of.bytes) * state_of.waiting)
    if length(queue, group.tenant) + count > share or state_of.bytes + bytes > 2 * most_bytes or share >= capacity then
      local wait = state_of.rate and state_of.rate > 0 and math.ceil(1000 * over / state_of.rate) or -1
      return { 'full', queue, state_of.waiting, wait }
    end
  end
  state_of.waiting, state_of.bytes = state_of.waiting + count, state_of.bytes + bytes
end

-- 2. May the tenants? A bucket of tokens each; a call larger than the bucket is let in when it is full, and leaves a debt.
local buckets = {}
for _, group in ipairs(groups) do
  if group.rate > 0 then
    local bucket = buckets[group.tenant]
    if not bucket then
      local state = redis.call('HMGET', 'muai:rate:' .. group.tenant, 'tokens', 'at')
      local tokens = tonumber(state[1]) or group.burst
      tokens = math.min(group.burst, tokens + (now - (tonumber(state[2]) or now)) / 1000 * group.rate)
      bucket = { tokens = tokens, wanted = 0, group = group }
      buckets[group.tenant] = bucket
    end
    bucket.wanted = bucket.wanted + #news(group)
  end
end
for tenant, bucket in pairs(buckets) do
  local missing = math.min(bucket.wanted, bucket.group.burst) - bucket.tokens
  if bucket.wanted > 0 and missing > 0 then return { 'rate', tenant, math.ceil(1000 * missing / bucket.group.rate) } end
end
for tenant, bucket in pairs(buckets) do
  local key, group = 'muai:rate:' .. tenant, bucket.group
  redis.call('HSET', key, 'tokens', string.format('%.6f', bucket.tokens - bucket.wanted), 'at', now)
  redis.call('EXPIRE', key, math.ceil((group.burst + bucket.wanted) / group.rate) + 60)
end

-- 3. Then they go.
local out = { 'ok' }
for _, group in ipairs(groups) do
  local new, messages, marks, pushed = news(group), {}, {}, {}
  for _, i in ipairs(new) do
    messages[#messages + 1] = ARGV[i + 1]
    marks[#marks + 1] = now
    marks[#marks + 1] = ARGV[i]
    pushed[i] = 1
  end
  for i = group.first, group.last, 2 do out[#out + 1] = pushed[i] or 0 end
  if #messages > 0 then
    redis.call('ZADD', KEYS[1], unpack(marks)) -- the first write: a full broker refuses it
    push(group.list, 'L', messages, true)
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - 1000 * ttl)
return out
