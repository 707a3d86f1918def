--!include lists
-- Push new requests, all of them or none: each id once, no queue past its capacity, no tenant past its rate.
--
-- An id stands for its content. While it is under way, or has its result, it is not pushed again: the same content is known,
-- another content is a conflict. Whether what should be under way has a message at all is for a worker to look. A request that
-- failed or was cancelled may be submitted again: its record goes. But where a submit is tried again by itself, because it is
-- not known what became of it, that record may be its own, and stands. A queue is full at its capacity, by number or by
-- bytes; a tenant with less than an equal share of the capacity waiting is let in all the same, so that nobody can fill a queue
-- against the others: what waits stays under twice the capacity.
--
-- KEYS[1]   muai:underway   zset request id -> when it was submitted, ms
-- KEYS[2]   muai:contents   hash request id -> digest of its content, while it is under way
-- KEYS[3]   muai:cancelled  zset result key -> time of cancellation, ms
-- KEYS[4]   muai:doubted    hash request id -> list, newline, message: to be looked for
-- KEYS[5]   muai:deadlines  zset request id, newline, list -> its deadline, ms
-- ARGV[1]   seconds that a submission is remembered, should nobody ever answer it
-- ARGV[2]   capacity of a queue, messages
-- ARGV[3]   capacity of a queue, bytes
-- ARGV[4]   the deadlines of those that have one, ms, JSON by their ids; '' where none has
-- ARGV[5]   1 where this submit was tried before
-- ARGV[6+]  for each list: the list; requests a second that its tenant may submit (0: any number) and how many at once;
--           the number of its requests, at most 1000; for each of them its id, its content's digest and its message
-- Returns   { 'ok', one 1 or 0 a request: 0 where it was known }
--           { 'conflict', ids that stand for another content }
--           { 'full', queue, messages waiting, ms until there is room (-1: unknown) }
--           { 'rate', tenant, ms until it may }
local ttl, capacity, most_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local deadlines = ARGV[4] ~= '' and cjson.decode(ARGV[4])
local groups, at = {}, 6
while at <= #ARGV do
  local list, count = ARGV[at], tonumber(ARGV[at + 3])
  local queue, tenant = parts(list)
  groups[#groups + 1] = { list = list, queue = queue, tenant = tenant, first = at + 4, last = at + 1 + 3 * count,
                          rate = tonumber(ARGV[at + 1]), burst = tonumber(ARGV[at + 2]) }
  at = at + 4 + 3 * count
end

-- Which of a group's requests are new, as places of their ids in ARGV; asked once, of all of them together.
local seen, conflicts, again, doubted = {}, {}, {}, {}

-- What a record says: its status, and the digest of what it answers where it has one.
local function read(record)
  local start = redis.pcall('GETRANGE', record, 0, 95)
  if type(start) ~= 'string' then return 'SUCCESS' end -- no text, so no record of ours: it stays
  return string.match(start, '"status":%s*"(%u+)"') or start ~= '' and 'SUCCESS', string.match(start, '^{"content":"(%x+)"')
end

local function news(group)
  local ids, results = {}, {}
  for i = group.first, group.last, 3 do
    ids[#ids + 1] = ARGV[i]
    results[#results + 1] = 'celery-task-meta-' .. ARGV[i]
  end
  local under_way = redis.call('ZMSCORE', KEYS[1], unpack(ids))
  local answered = redis.call('EXISTS', unpack(results)) > 0
  local found = {}
  for n, id in ipairs(ids) do
    local place = group.first + 3 * (n - 1)
    local content, known = seen[id], true
    if not content and under_way[n] then
      content = redis.call('HGET', KEYS[2], id)
      if not (answered and redis.call('EXISTS', results[n]) == 1) and not string.find(id, '["\\]') then
        doubted[#doubted + 1] = { id, group.list .. '\n' .. ARGV[place + 2] }
      end
    elseif not content then
      local status
      if answered then status, content = read(results[n]) end
      known = status == 'SUCCESS' or ARGV[5] == '1' and (status == 'FAILURE' or status == 'REVOKED')
      if status and not known then again[#again + 1] = results[n] end
    end
    if content and content ~= ARGV[place + 1] then
      conflicts[#conflicts + 1] = id
    elseif not known then
      found[#found + 1] = place
    end
    seen[id] = ARGV[place + 1]
  end
  group.news = found
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

-- 1. Does each id stand for what it stood for before?
for _, group in ipairs(groups) do news(group) end
if #conflicts > 0 then return { 'conflict', unpack(conflicts, 1, math.min(#conflicts, 100)) } end

-- 2. Is there room? What this call itself adds is counted by queue.
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
  for _, i in ipairs(group.news) do count, bytes = count + 1, bytes + #ARGV[i + 2] end
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

-- 3. May the tenants? A bucket of tokens each; a call larger than the bucket is let in when it is full, and leaves a debt.
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
    bucket.wanted = bucket.wanted + #group.news
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

-- 4. Then they go.
local out = { 'ok' }
for _, group in ipairs(groups) do
  local messages, marks, contents, pushed = {}, {}, {}, {}
  for _, i in ipairs(group.news) do
    messages[#messages + 1] = ARGV[i + 2]
    marks[#marks + 1] = now
    marks[#marks + 1] = ARGV[i]
    contents[#contents + 1] = ARGV[i]
    contents[#contents + 1] = ARGV[i + 1]
    pushed[i] = 1
  end
  for i = group.first, group.last, 3 do out[#out + 1] = pushed[i] or 0 end
  if #messages > 0 then
    redis.call('ZADD', KEYS[1], unpack(marks)) -- the first write: a full broker refuses it
    redis.call('HSET', KEYS[2], unpack(contents))
    push(group.list, 'L', messages, true)
    local late = {}
    for _, i in ipairs(deadlines and group.news or {}) do
      local deadline = deadlines[ARGV[i]]
      if deadline then
        late[#late + 1] = deadline
        late[#late + 1] = ARGV[i] .. '\n' .. group.list
      end
    end
    if #late > 0 then redis.call('ZADD', KEYS[5], unpack(late)) end
  end
end
for _, record in ipairs(again) do redis.call('DEL', record) end
if redis.call('EXISTS', KEYS[3]) == 1 then -- of what was cancelled under these ids before, nothing counts any longer
  for _, group in ipairs(groups) do
    for _, i in ipairs(group.news) do redis.call('ZREM', KEYS[3], 'celery-task-meta-' .. ARGV[i]) end
  end
end
for _, entry in ipairs(doubted) do
  if redis.call('HLEN', KEYS[4]) >= 1000 then break end
  redis.call('HSET', KEYS[4], unpack(entry))
  redis.call('EXPIRE', KEYS[4], 3600)
end
local old = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - 1000 * ttl, 'LIMIT', 0, 1000)
if #old > 0 then
  redis.call('ZREM', KEYS[1], unpack(old))
  redis.call('HDEL', KEYS[2], unpack(old))
end
return out
