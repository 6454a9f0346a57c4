"""The five streams, each a file, and the runner that reads, commits, retries, dead-letters and measures for the local
four."""
