-- What every script that puts a message on a list shares.
--
-- A queue's list is the shared one, as kombu names it. Beside it lie lanes: lists of the messages of one tenant, and of those
-- of a tenant that one worker should have. A lane is named <tenant> or <tenant>@<affinity>; who names no tenant is ''.
--   <queue>, <queue>\6\22<step>           the shared lists, one a priority step
--   muai:lane:<shared list>:<lane>        a lane
--   muai:lanes:<shared list>              zset tenant -> what was taken of its lanes, over its weight: the least is next. A
--                                         tenant is in it while its lanes hold messages; '' stands for the shared list too
--   muai:lanes:<shared list>:<tenant>     hash affinity -> since when its lane has held messages or was served last, ms
--   muai:queue:<queue>                    hash: laned   messages in lanes
--                                               bytes   size of all messages
--                                               at, taken, rate   since when claims are counted, how many, per second before
--                                               passed<n>         more urgent messages claimed since step n had its turn
--                                               turn:<list>       the score that was last served among its lanes

-- The queue of a list, its tenant, its affinity (nil: any worker may have it), and the shared list.
local function parts(list)
  local shared, lane = string.match(list, '^muai:lane:([^:]+):(.+)$')
  local tenant, affinity = string.match(lane or '', '^([^@]*)@?(.*)$')
  return (string.gsub(shared or list, '\6\22%d+$', '')), tenant, affinity ~= '' and affinity or nil, shared or list
end

local function lane_of(shared, tenant, affinity)
  if tenant == '' and not affinity then return shared end
  return 'muai:lane:' .. shared .. ':' .. tenant .. (affinity and '@' .. affinity or '')
end

local function affine_lanes(shared, tenant)
  return 'muai:lanes:' .. shared .. ':' .. tenant
end

-- Messages were put on a list. The queues of Celery's own are not counted, those of requests are, from the first that is
-- submitted.
local function counted(list, messages, submitted)
  local queue, tenant, affinity, shared = parts(list)
  local bytes = 0
  for _, message in ipairs(messages) do bytes = bytes + #message end
  if list ~= shared then
    -- It joins a turn behind the one that is being served: who comes anew each time gets no more than who waits.
    local turn = tonumber(redis.call('HGET', 'muai:queue:' .. queue, 'turn:' .. shared)) or 0
    redis.call('ZADD', 'muai:lanes:' .. shared, 'NX', turn + 1, tenant)
    if affinity then
      local time = redis.call('TIME')
      redis.call('HSETNX', affine_lanes(shared, tenant), affinity, time[1] * 1000 + math.floor(time[2] / 1000))
    end
    redis.call('HINCRBY', 'muai:queue:' .. queue, 'laned', #messages)
    redis.call('HINCRBY', 'muai:queue:' .. queue, 'bytes', bytes)
  elseif submitted or redis.call('EXISTS', 'muai:queue:' .. queue) == 1 then
    redis.call('HINCRBY', 'muai:queue:' .. queue, 'bytes', bytes)
  end
end

-- Put messages on a list: side 'L' is behind everything that waits, 'R' in front of it.
local function push(list, side, messages, submitted)
  for first = 1, #messages, 1000 do
    local last = math.min(first + 999, #messages)
    redis.call(side == 'R' and 'RPUSH' or 'LPUSH', list, unpack(messages, first, last))
  end
  counted(list, messages, submitted)
end
