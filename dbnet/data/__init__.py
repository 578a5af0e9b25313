"""What is learned: examples in an HDF5 file, cut into subsets, minibatches and portions.

formats/ (digits, images, ...) -> preparation (some held out, inputs normalized) -> file (the data file, checked) -> batches
(minibatches and their cursor) -> subsets (what a replica trains on under Downpour, handed on when it is lost) or portions (what
Sandblaster hands out, read ahead). predictions: what a network makes of a data file, as a file; confusion: how it
does class by class; together: the examples of all replicas of one process, read in one pass.
"""
