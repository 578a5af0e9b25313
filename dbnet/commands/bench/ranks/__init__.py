"""Benchmarks of several ranks: wire (fetch and push), partitions (a cut replica), job (a whole run), torch_job (it in PyTorch),
start (starts and ends, of starting).

record (a recorded schedule, a trace) and origins (replicas that only report) have their benchmark and its program in one file.
"""
