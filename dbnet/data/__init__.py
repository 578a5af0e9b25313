"""Data: the HDF5 layout (base) and the formats it is prepared from, one file, one kind."""
