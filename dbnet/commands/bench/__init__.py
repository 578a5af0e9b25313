"""Benchmarks: a family, one file each; `base` is what a member has, `command` runs them, ranks/ start under mpirun."""
