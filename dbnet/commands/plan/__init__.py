"""What a run will need: `command`, ranks (what each owns, moves and holds), words, slurm (a batch script for it).

predict: how it will go on a machine, by a dry simulation, and how that compares with a run that was made.
"""
