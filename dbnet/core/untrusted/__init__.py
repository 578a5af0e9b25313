"""Opening HDF5 files that somebody else may have made, or that are damaged.

opening refuses what leads out of a file or claims more than it can hold; mappings checks, in the bytes, what HDF5 would crash on.
"""
