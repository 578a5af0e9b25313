"""What a run says of itself, and how it is looked at.

tables (every column of every table) -> runfile (the writer; tensorboard: the same for that program) -> results (the reader, pandas)
-> many/ (runs together: how they differ, their frames) -> pictures/ (of one run, or of several; a page), inspect (what is in a
file). display prints lines while a run goes on, live shows it on a terminal. trace/ is another record, of what every rank does
when.
"""
