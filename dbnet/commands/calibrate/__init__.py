"""Measure a machine for simulated time and predictions: `dbnet calibrate`.

kernels (steps of networks, in processor seconds, and the rates that explain them), ranks (real runs and one-sided operations on
ranks that a launcher has started, by itself for three of them) -> machine (the file) -> command.
"""
