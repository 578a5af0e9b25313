"""What every room uses; it knows nothing of networks or ranks.

errors (sentences for users) <- toml (nested tables), files (whole or not at all), untrusted (opening what others wrote), registry
(kind -> class) <- config (a run as one typed value). ranges is the one ownership arithmetic: units, parameters, examples. jit
declares kernels and has them ready; kernels/ holds those on flat vectors, and what makes and loads machine code. version: the
version.
"""
