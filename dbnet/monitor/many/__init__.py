"""Runs together: how they differ and which repeat one another (differences), their frames as one and a table of them (frames)."""
