--[[ Makes a dead letter of a job that its worker cannot read, and tells its front.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  worker
ARGV[3]  receipt
]]
local stream, entry = owned(ARGV[2], ARGV[3])
local fields = stream and read(stream, entry)
if fields then
  bury(stream, entry, fields, 'unreadable', ARGV[2], rules.unreadable)
end
