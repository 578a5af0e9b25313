"""Layers: a family, one file each; `base` is what a member has.

Beside the members stand their mathematics: activations, filters (kernels of local and shared weights), patches (geometry), gemm.
"""
