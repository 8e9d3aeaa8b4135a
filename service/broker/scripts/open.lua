--[[ Makes the streams where there are none. Returns {time, epoch}.

KEYS[1], ARGV[1]  see common.lua
]]
return {seconds(time), redis.call('GET', key('epoch'))}
