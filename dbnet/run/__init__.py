"""One execution: what every rank knows, the roles built from it, played on MPI ranks or in one process.

setup (configuration, data, model, topology, checkpoint) -> roles (a worker, a server, a coordinator) -> ranks (one role per MPI
rank; starting: how ranks come together) or process (all in one process) -> train. inference: a checkpoint evaluates and
predicts; predictions: what is written of that. outcome: what came of a run. signals: SIGTERM and its kin.
"""
