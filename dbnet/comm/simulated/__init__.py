"""Simulated time: the ends of windows, messages and links in one process, where everything takes virtual seconds.

rest (a rank that finds nothing sleeps) -> player (a rank's role, and how it rests) -> clock (whose turn it is: the rank with the
earliest clock), cores (those that ranks of a host share), mortal (clocks of ranks that may die) -> interconnect (when bytes arrive:
latency, bandwidth, a host's network card), memory (of all ranks' windows) -> window (one-sided operations take effect when they
arrive), messages (channels of servers, links of partitions) -> movers (what moves a rank's data while it computes).
"""
