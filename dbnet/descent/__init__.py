"""Batch methods over a Space: what they share (base) and one file for each family of directions."""
