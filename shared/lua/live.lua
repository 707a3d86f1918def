--!include roster
-- The workers that have announced themselves lately: all of them, or what has changed of them.
--
-- KEYS[1-5]  see roster.lua
-- ARGV[1]    ms of silence after which a worker does not count
-- ARGV[2]    a stamp: what has changed since then is wanted; empty: all
-- Returns    see roster.lua
return changes(now - ARGV[1], ARGV[2])
