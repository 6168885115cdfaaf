-- Makes changes of the catalogue one version.
-- KEYS: version, items, stream; ARGV: length of the stream, then kind, item and payload of each change.
-- Returns the version, and the places of the changes that were not made.
-- The hash holds the latest change only, one field per item and kind: a put or a delete is the whole truth of an item;
-- an availability or a patch adds to it, but not to a deleted item. A patch is `name:version-place:size:value` of each
-- of its fields, the newest of each. The stream names the fields of the hash that a version changed, no more.
local function merged(stored, change, stamp)
  local fields = {}
  local function read(text, from, new)
    while from <= #text do
      local _, colon, name, old, size = string.find(text, '^([%w_]+):([%d-]+):(%d+):', from)
      from = colon + 1 + size
      fields[name] = (new or old) .. ':' .. size .. ':' .. string.sub(text, colon + 1, from - 1)
    end
  end
  if stored then read(stored, string.find(stored, ':', 1, true) + 1) end
  read(change, 1, stamp)
  local out = {}
  for name, field in pairs(fields) do out[#out + 1] = name .. ':' .. field end
  return table.concat(out)
end
local version, names, refused = false, {}, {}
for at = 2, #ARGV, 3 do
  local kind, item, payload = ARGV[at], ':' .. ARGV[at + 1], ARGV[at + 2]
  local place = (at - 2) / 3
  local adds = kind == 'availability' or kind == 'patch'
  if adds and redis.call('HEXISTS', KEYS[2], 'delete' .. item) == 1 then
    refused[#refused + 1] = place
  else
    version = version or redis.call('INCR', KEYS[1])
    if not adds then
      redis.call('HDEL', KEYS[2], 'put' .. item, 'delete' .. item, 'availability' .. item, 'patch' .. item)
    end
    local stamp = string.format('%d-%d', version, place)
    if kind == 'patch' then payload = merged(redis.call('HGET', KEYS[2], 'patch' .. item), payload, stamp) end
    redis.call('HSET', KEYS[2], kind .. item, stamp .. ':' .. payload)
    names[#names + 1] = kind .. item
    names[#names + 1] = ''
  end
end
if version then redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[1], version .. '-0', unpack(names)) end
return {version or redis.call('GET', KEYS[1]) or 0, refused}
