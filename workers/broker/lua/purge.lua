--!include lists
-- Empty a queue, its tenants' lanes too. Who waits for an answer is not told, as with every purge of Celery's.
-- KEYS[1..] the shared lists of the queue. Returns how many messages have gone.
local gone = 0

local function empty(list)
  gone = gone + redis.call('LLEN', list)
  redis.call('UNLINK', list)
end

for _, shared in ipairs(KEYS) do
  local tenants = redis.call('ZRANGE', 'muai:lanes:' .. shared, 0, -1)
  tenants[#tenants + 1] = ''
  for _, tenant in ipairs(tenants) do
    for _, affinity in ipairs(redis.call('HKEYS', affine_lanes(shared, tenant))) do
      empty(lane_of(shared, tenant, affinity))
    end
    empty(lane_of(shared, tenant))
    redis.call('UNLINK', affine_lanes(shared, tenant))
  end
  redis.call('UNLINK', 'muai:lanes:' .. shared)
end
redis.call('HDEL', 'muai:queue:' .. parts(KEYS[1]), 'laned', 'bytes')
return gone
