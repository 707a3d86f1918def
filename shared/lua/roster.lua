-- What those who announce themselves and those who only ask share: the workers that have announced themselves lately.
--
-- KEYS[1]  muai:workers:seen     zset worker id -> last announcement, ms
-- KEYS[2]  muai:workers:info     hash worker id -> JSON
-- KEYS[3]  muai:workers:more     hash worker id -> JSON: what readers of 0.1.0 would refuse
-- KEYS[4]  muai:workers:digests  hash worker id -> digest of what of it lasts; '' -> when changes were looked after last,
--                                 ms; '.' -> since when they are kept, ms
-- KEYS[5]  muai:workers:changed  zset worker id -> when it came, changed or went, ms
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- What has changed since a stamp ('': all is wanted), where a worker does not count that is silent since silence, ms.
-- Returns  { stamp, 1 where it is all of them, { ids of workers that went or are silent },
--            { id, ms since its announcement, JSON, the other JSON or '', ... } }
local function changes(silence, stamp)
  local epoch, since = string.match(stamp, '^(%d+):(%d+)$')
  local seen, kept = redis.call('HGET', KEYS[4], ''), redis.call('HGET', KEYS[4], '.')
  local whole = not since or now < tonumber(since) or epoch ~= kept
    or tonumber(seen or 0) < silence -- where only workers of 0.1.0 live nobody keeps changes
  local gone, out, ids = {}, {}, nil
  if whole then
    ids = redis.call('ZRANGEBYSCORE', KEYS[1], silence, '+inf', 'WITHSCORES')
  else
    ids = redis.call('ZRANGEBYSCORE', KEYS[5], since, '+inf', 'WITHSCORES')
    gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. silence)
  end
  for i = 1, #ids, 2 do
    local worker = ids[i]
    local info = redis.call('HGET', KEYS[2], worker)
    if info then
      out[#out + 1] = worker
      out[#out + 1] = now - ids[i + 1]
      out[#out + 1] = info
      out[#out + 1] = redis.call('HGET', KEYS[3], worker) or ''
    else
      gone[#gone + 1] = worker
    end
  end
  return { string.format('%s:%d', kept or '0', now), whole and 1 or 0, gone, out }
end

