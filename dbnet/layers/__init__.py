"""Layers: one file, one kind."""
