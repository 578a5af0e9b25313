"""`dbnet replay`: a recorded run is played again in one process, and compared with its record to the bit.

command is what a user calls. world plays the roles of a run as they were recorded: shard is a shard's timeline, replica what a
replica sees in place of shards and coordinator. passes plays a batch method: bundles is a shard that adds them up, crew the
replica that computes them. outcome says what was compared, and what differed first; moment writes what the shards held after so
many updates, or one gradient.
"""
