#!lua flags=allow-oom
-- Write: small things that are for any instance to write, as one atomic step: what people decide, and statistics.
-- allow-oom, so that a store that takes no events any more still takes these.
--
-- KEYS 1 any key of Nexus's own
-- ARGV 1 the commands
-- include _commands
carry_out(ARGV[1])
return 'OK'
