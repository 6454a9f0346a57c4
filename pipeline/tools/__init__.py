"""Tools, each run by `python -m`: traffic, recorded events, drills, training sets. Nexus itself imports none of them."""
