"""The benchmarks: `make bench` runs every `bench_<topic>.py` here and prints one table.

A topic is a module with `TITLE` and `run(options: Options) -> list[Row]`. It starts what it measures through
harness.System, loads it with load, and gives each figure as a Row (table.py): the median of interleaved repetitions
with their spread.
"""
