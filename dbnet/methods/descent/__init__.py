"""Batch methods: a family, one file each; `base` is what a member has.

Beside the members stand problem (what they minimize), history (pairs of L-BFGS, directions by Gram matrix) and linesearch (strong
Wolfe).
"""
