"""Benchmarks: each file one question, one table, one picture. `python -m benchmarks` lists them."""
