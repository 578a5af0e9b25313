"""A run in simulated time: all roles in one process, each with a clock of virtual seconds, and the code of an MPI run.

noise (what is drawn) -> faults (machines that die) -> replicas (gradients that take virtual seconds; dry ones that take nothing
else) and shards (that take their time to apply) -> world (the ends of window, channel, link) -> simulate (plays all roles).
"""
