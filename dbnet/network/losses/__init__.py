"""Loss functions: a family, one file each; `base` is what a member has."""
