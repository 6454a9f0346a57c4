"""Features: what they are made of, how events are counted in tiles, and how values are read out of these, now or as of a past moment."""
