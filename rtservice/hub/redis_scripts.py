"""The keys of presence and claims in Redis, and the Lua scripts that change them.

With the prefix `rtservice`, and an incarnation (16 hexadecimal digits, new for each process):

    rtservice:p          sorted set: incarnation → end of its lease, in milliseconds of Redis's clock
    rtservice:m:TOPIC    hash: INCARNATION:NUMBER → member
    rtservice:c:KEY      string: INCARNATION:NUMBER:HOLDER of a claim
    rtservice:i:INCARNATION
                         set of what the process has: mNUMBER:TOPIC and cNUMBER:KEY

A claim is valid while the lease of its process is. So one ZADD for each process renews everything, however many members
and claims it has. Any process removes what others leave, in batches, by the set of the incarnation.

Redis runs a script as a whole, before any other command, and replicates its effects as a whole. Each run handles a
bounded batch, in about a millisecond at most. The scripts are sent as text with EVAL, since presence is not a hot path:
there is no state of the script cache that could be lost.
"""

from __future__ import annotations

# Milliseconds that members and claims of a process last without a heartbeat.
LEASE_MS = 20_000

# The most changes, and expired entries, that one run of a script handles.
BATCH = 100

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# ARGV: prefix, incarnation, lease. Renews the lease; returns whether it was valid, and up to 8 that are not.
RENEW = f"""{_NOW}
local lease = tonumber(redis.call('ZSCORE', ARGV[1] .. ':p', ARGV[2]) or 0)
redis.call('ZADD', ARGV[1] .. ':p', now + ARGV[3], ARGV[2])
return {{lease > now and 1 or 0, redis.call('ZRANGEBYSCORE', ARGV[1] .. ':p', '-inf', now, 'LIMIT', 0, 8)}}
"""

# ARGV: prefix, incarnation, then four for each change: its kind, its number, the topic or key, the member or holder.
# Kinds: J join, L leave, C claim, R release. Returns 1 for each change, 0 for a claim that another holds; or 0 instead
# of them all, and changes nothing, if the lease has ended.
CHANGE = f"""{_NOW}
local prefix, me = ARGV[1], ARGV[2]
if tonumber(redis.call('ZSCORE', prefix .. ':p', me) or 0) <= now then return 0 end
local index = prefix .. ':i:' .. me
local results = {{}}
for at = 3, #ARGV, 4 do
  local kind, number, name, value = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local field, result = me .. ':' .. number, 1
  if kind == 'J' then
    redis.call('HSET', prefix .. ':m:' .. name, field, value)
    redis.call('SADD', index, 'm' .. number .. ':' .. name)
  elseif kind == 'L' then
    redis.call('HDEL', prefix .. ':m:' .. name, field)
    redis.call('SREM', index, 'm' .. number .. ':' .. name)
  else
    local key, mine = prefix .. ':c:' .. name, field .. ':'
    local held = redis.call('GET', key)
    local is_mine = held and string.sub(held, 1, #mine) == mine
    if kind == 'R' then
      if is_mine then redis.call('DEL', key) end
      redis.call('SREM', index, 'c' .. number .. ':' .. name)
    else
      local owner = held and string.sub(held, 1, #me)
      if held and not is_mine and tonumber(redis.call('ZSCORE', prefix .. ':p', owner) or 0) > now then
        result = 0
        redis.call('SREM', index, 'c' .. number .. ':' .. name)
      else
        redis.call('SET', key, mine .. value)
        redis.call('SADD', index, 'c' .. number .. ':' .. name)
      end
    end
  end
  results[#results + 1] = result
end
return results
"""

# ARGV: prefix, incarnation, batch, `force` or empty. Removes a batch of what an incarnation left, unless its lease is
# valid and not `force`. Returns 1 if more may be left.
REAP = f"""{_NOW}
local prefix, dead, batch = ARGV[1], ARGV[2], tonumber(ARGV[3])
if ARGV[4] ~= 'force' and tonumber(redis.call('ZSCORE', prefix .. ':p', dead) or 0) > now then return 0 end
local entries = redis.call('SPOP', prefix .. ':i:' .. dead, batch)
for _, entry in ipairs(entries) do
  local colon = string.find(entry, ':', 1, true)
  local number, name = string.sub(entry, 2, colon - 1), string.sub(entry, colon + 1)
  if string.sub(entry, 1, 1) == 'm' then
    redis.call('HDEL', prefix .. ':m:' .. name, dead .. ':' .. number)
  else
    local key, mine = prefix .. ':c:' .. name, dead .. ':' .. number .. ':'
    local held = redis.call('GET', key)
    if held and string.sub(held, 1, #mine) == mine then redis.call('DEL', key) end
  end
end
if #entries == batch then return 1 end
redis.call('ZREM', prefix .. ':p', dead)
return 0
"""

# ARGV: prefix, topic, most. Returns the number of members, and at most `most` of them. Members whose process has no
# valid lease are removed and not shown: so those are gone when the lease ends, and not only when it is reaped.
MEMBERS = f"""{_NOW}
local key = ARGV[1] .. ':m:' .. ARGV[2]
local found = redis.call('HRANDFIELD', key, ARGV[3], 'WITHVALUES')
local alive, members = {{}}, {{}}
for at = 1, #found, 2 do
  local owner = string.sub(found[at], 1, 16)
  if alive[owner] == nil then
    alive[owner] = tonumber(redis.call('ZSCORE', ARGV[1] .. ':p', owner) or 0) > now
  end
  if alive[owner] then members[#members + 1] = found[at + 1] else redis.call('HDEL', key, found[at]) end
end
return {{redis.call('HLEN', key), members}}
"""
