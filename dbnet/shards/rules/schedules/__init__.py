"""Learning-rate schedules: a family, one file each; `base` is what a member has, and how a rule follows it."""
