"""How requests, streams and jobs share one interpreter: together, in turns, and what somebody waits for first."""
