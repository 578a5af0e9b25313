"""Commands that train: train, simulate; and sweep, many runs of a grid.

A grid (grid) becomes a list of points; state says which of them have a run already; worker trains one after another in a process
of its own; bar shows how far all are; table sets side by side what came out.
"""
