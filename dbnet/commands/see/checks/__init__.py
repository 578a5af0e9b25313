"""What must hold of every member, a user's own ones and those that come with dbnet: `dbnet check`, and the tests.

base (what a check is) <- layers, losses, rules, methods (the checks of a family); partitioned: a cut network in one process; runs:
a small run that a member takes part in. command puts them together for a user's file.
"""
