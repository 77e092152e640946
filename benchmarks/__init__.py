"""Benchmarks. `python -m benchmarks` runs all and prints one table; README.md says how to read it."""
