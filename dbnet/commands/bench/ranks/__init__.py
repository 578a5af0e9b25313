"""Benchmarks of several ranks: wire (fetch and push), partitions (a cut replica), job (a whole run), torch_job (it in PyTorch)."""
