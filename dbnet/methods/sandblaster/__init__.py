"""Sandblaster: a batch method over many replicas (section 4.2, algorithm 7.2).

method: the options and what it is made of. coordinator: makes the batch method's passes; recording: writes down what decides
them. work_queue: portions, handed out and judged; tasks: what stands in the window about them, and the replica's half. worker: the
replica.
"""
