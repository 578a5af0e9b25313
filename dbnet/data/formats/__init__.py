"""Formats that are made into data files: a family, one file each; `base` is what a member has."""
