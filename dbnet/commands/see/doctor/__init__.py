"""Look whether this machine, or the hosts of a job, can run dbnet well: `dbnet doctor`.

base (what is found, and how it is shown) <- software (Python, packages, BLAS, kernels, HDF5), host (cores, memory, names, disk,
Slurm), onesided (MPI on ranks that a launcher has started, run by itself for two of them) <- command.
"""
