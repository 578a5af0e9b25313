"""What every rank did when, to the microsecond, as a timeline.

lane (spans of one thread of one rank, in a file that is its memory; the writer and the reader) -> attach (puts clocks around what a
worker, a server and a coordinator are made of) and perfetto (the packets of Perfetto's format) -> timeline (a run's lanes as one
file for a viewer, and what each rank spent its time on).
"""
