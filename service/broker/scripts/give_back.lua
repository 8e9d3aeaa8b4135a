--[[ Lets jobs wait again that a worker did not begin; those that are not its own any more are left alone.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  worker
ARGV[3..]  receipts
]]
for i = 3, #ARGV do
  local stream, entry = owned(ARGV[2], ARGV[i])
  if stream then
    local _, count = holder(stream, entry)
    put_back(stream, entry, count, ARGV[2], false)
  end
end
