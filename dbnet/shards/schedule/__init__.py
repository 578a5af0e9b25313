"""The schedule of an asynchronous run as it was recorded: with it the run can be played again to the bit.

log: the file that one rank writes, and its reader. paths: where it lies. slices: into which slices of a shard pushes come.
serving: a shard that counts and writes down what it applies. fetching: how a replica fetches and pushes, writing down what it has
read.
"""
