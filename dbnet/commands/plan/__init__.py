"""What a run will need: `command`, ranks (what each owns, moves and holds), words, slurm (a batch script for it)."""
