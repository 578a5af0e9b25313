"""What a run will need: `command`, ranks (what each owns, moves and holds), words, slurm (a batch script for it).

step: what one takes a cut replica on a machine. predict: how a run will go there, by a dry simulation, and how that compares with
one that was made.
"""
