"""Update rules: a family, one file each; `base` is what a member has."""
