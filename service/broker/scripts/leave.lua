--[[ Forgets a worker that ends in order. What it has in hand after all waits again, and that was no try.

KEYS[1], ARGV[1]  see common.lua
ARGV[2]  worker
]]
remove_worker(ARGV[2], false)
