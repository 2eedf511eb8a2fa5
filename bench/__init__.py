"""Benchmarks: ``python -m bench --out DIR``."""
