"""Benchmarks of leakbench itself."""
