--!include lists
-- Push new requests, all of them or none: each id once, no queue past its capacity, no tenant past its rate.
--
-- An id that is under way, or has its answer, is not pushed again. A queue is full at its capacity, by number or by bytes;
-- a tenant with less than an equal share of the capacity waiting is let in all the same, so that nobody can fill a queue
-- against the others: what waits stays under twice the capacity.
--
-- KEYS      none is fixed: everything is named by the arguments
-- ARGV[1]   seconds that a submission is remembered, should nobody ever answer it
-- ARGV[2]   capacity of a queue, messages
-- ARGV[3]   capacity of a queue, bytes
-- ARGV[4+]  for each list: the list; requests a second that its tenant may submit (0: any number) and how many at once;
--           the number of its requests; for each of them its id and its message
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
  groups[#groups + 1] = { list = list, queue = queue, tenant = tenant, first = at + 4, count = count,
                          rate = tonumber(ARGV[at + 1]), burst = tonumber(ARGV[at + 2]) }
  at = at + 4 + 2 * count
end

local function known(id)
  return redis.call('EXISTS', 'muai:submitted:' .. id, 'celery-task-meta-' .. id) > 0
end

-- How many of a group's requests are new, and their size. Asked only where it matters: mostly all of them are.
local function fresh(group)
  local count, bytes = 0, 0
  for i = group.first, group.first + 2 * group.count - 2, 2 do
    if not known(ARGV[i]) then count, bytes = count + 1, bytes + #ARGV[i + 1] end
  end
  return count, bytes
end

local steps = { '', '\6\0223', '\6\0226', '\6\0229' }

local function length(queue, tenant)
  local total = 0
  for _, step in ipairs(steps) do
    total = total + redis.call('LLEN', lane_of(queue .. step, tenant))
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
  local seen = adds[queue]
  if not seen then
    local state = redis.call('HMGET', 'muai:queue:' .. queue, 'laned', 'bytes', 'rate')
    seen = { waiting = length(queue, '') + (tonumber(state[1]) or 0), bytes = tonumber(state[2]) or 0, rate = tonumber(state[3]) }
    if seen.waiting == 0 then seen.bytes = 0 end
    adds[queue] = seen
  end
  local count, bytes = group.count, 0
  for i = group.first + 1, group.first + 2 * group.count - 1, 2 do bytes = bytes + #ARGV[i] end
  if seen.waiting + count > capacity or seen.bytes + bytes > most_bytes then count, bytes = fresh(group) end
  if count > 0 and (seen.waiting + count > capacity or seen.bytes + bytes > most_bytes) then
    local share = capacity / sharers(queue)
    local over = math.max(seen.waiting + count - capacity, (seen.bytes + bytes - most_bytes) / math.max(1, seen.bytes) * seen.waiting)
    if length(queue, group.tenant) + count > share or seen.bytes + bytes > 2 * most_bytes or share >= capacity then
      local wait = seen.rate and seen.rate > 0 and math.ceil(1000 * over / seen.rate) or -1
      return { 'full', queue, seen.waiting, wait }
    end
  end
  seen.waiting, seen.bytes = seen.waiting + count, seen.bytes + bytes
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
    bucket.wanted = bucket.wanted + (fresh(group))
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
  local messages = {}
  for i = group.first, group.first + 2 * group.count - 2, 2 do
    local id = ARGV[i]
    if redis.call('EXISTS', 'celery-task-meta-' .. id) == 1
      or not redis.call('SET', 'muai:submitted:' .. id, '1', 'NX', 'EX', ttl) then
      out[#out + 1] = 0
    else
      messages[#messages + 1] = ARGV[i + 1]
      out[#out + 1] = 1
    end
  end
  if #messages > 0 then
    redis.call('HSETNX', 'muai:queue:' .. group.queue, 'bytes', 0)
    push(group.list, 'L', messages)
  end
end
return out
