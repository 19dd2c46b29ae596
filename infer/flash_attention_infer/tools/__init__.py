"""Benchmarks of the caches, found by ``python -m flash_attention bench`` where this package is installed."""
