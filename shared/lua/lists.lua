-- What every script that puts a message on a list shares.
--
-- A queue's list is the shared one, as kombu names it. A tenant's messages wait on a list of their own beside it, its lane:
--   <queue>, <queue>\6\22<step>           the shared lists, one a priority step
--   muai:lane:<shared list>:<tenant>      the lane
--   muai:lanes:<shared list>              zset tenant -> what was taken of its lane, over its weight: the least is next.
--                                         A tenant is in it while its lane holds messages; '' is the shared list
--   muai:queue:<queue>                    hash: laned   messages in lanes
--                                               bytes   size of all messages
--                                               at, taken, rate   since when claims are counted, how many, per second before
--                                               passed<n>         more urgent messages claimed since step n had its turn
--                                               turn:<list>       the score that was last served among its lanes

-- The queue of a list, its tenant ('' for a shared list) and the shared list.
local function parts(list)
  local shared, tenant = string.match(list, '^muai:lane:([^:]+):(.+)$')
  return (string.gsub(shared or list, '\6\22%d+$', '')), tenant or '', shared or list
end

local function lane_of(shared, tenant)
  return tenant == '' and shared or 'muai:lane:' .. shared .. ':' .. tenant
end

-- Put messages on a list: side 'L' is behind everything that waits, 'R' in front of it. The queues of Celery's own are not
-- counted, those of requests are, from the first that is submitted.
local function push(list, side, messages, submitted)
  local queue, tenant, shared = parts(list)
  local bytes = 0
  for first = 1, #messages, 1000 do
    local last = math.min(first + 999, #messages)
    redis.call(side == 'R' and 'RPUSH' or 'LPUSH', list, unpack(messages, first, last))
    for i = first, last do bytes = bytes + #messages[i] end
  end
  if tenant ~= '' then
    -- It joins a turn behind the one that is being served: who comes anew each time gets no more than who waits.
    local turn = tonumber(redis.call('HGET', 'muai:queue:' .. queue, 'turn:' .. shared)) or 0
    redis.call('ZADD', 'muai:lanes:' .. shared, 'NX', turn + 1, tenant)
    redis.call('HINCRBY', 'muai:queue:' .. queue, 'laned', #messages)
    redis.call('HINCRBY', 'muai:queue:' .. queue, 'bytes', bytes)
  elseif submitted or redis.call('EXISTS', 'muai:queue:' .. queue) == 1 then
    redis.call('HINCRBY', 'muai:queue:' .. queue, 'bytes', bytes)
  end
end
