"""Benchmarks of several ranks: programs for mpirun: wire (fetch and push), partitions (a cut replica)."""
