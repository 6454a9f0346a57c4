"""The bridge's parts: its lanes and windows, the circuit before the partner, calls, what replies mean, and the records of it."""
