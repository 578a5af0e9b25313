"""Benchmarks: one file, one kind."""
