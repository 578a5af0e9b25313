"""One execution: what every rank knows, the roles built from it, played on MPI ranks, in one process or in simulated time.

setup (configuration, data, model, topology, checkpoint) -> roles (a worker, a server, a coordinator) -> ranks (one role per MPI
rank; starting: how ranks come together) or process (all in one process) -> train, or simulated/ (in virtual seconds). inference:
a checkpoint evaluates and predicts. outcome: what came of a run. signals: SIGTERM and its kin.
"""
