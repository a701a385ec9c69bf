"""Benchmarks: a file that defines CASE is one, found by its name. `python -m benchmarks --list`."""
