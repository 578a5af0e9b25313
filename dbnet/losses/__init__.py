"""Losses on the output units: one file, one kind."""
