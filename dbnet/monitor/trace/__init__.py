"""What every rank did when, to the microsecond, as a timeline.

lane (spans of one thread of one rank, in a file that is its memory; the writer and the reader) -> attach (puts clocks around what a
worker is made of) -> servers (around a server and the coordinator); perfetto (the packets of Perfetto's format) -> timeline (the
lanes of a run as one file for a viewer, and what each rank spent its time on).
"""
