"""How ranks reach each other: over MPI, within one process, or in simulated time.

topology says who is what; communicators splits MPI's world accordingly, once. mpi starts MPI and ends all ranks together. Data
flow through three ends: window (one-sided, origins -> targets), channel (messages between coordinator and shards), link (the
partitions of one replica). turns is how roles give way to each other, patience how long they wait; threads moves data and writes
files beside the main thread. simulated/ has the same ends in virtual seconds.
"""
