"""Initial values of weights: a family, one file each kind; `base` is what a member has."""
