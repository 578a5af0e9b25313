"""The command line, one file per command or pair of commands.

A file holds, for each of its commands, COMMAND_arguments(parser) and run_COMMAND(options); the door, __main__, imports the one
that is called; a new one is a file here and a line of its COMMANDS. base: arguments that several share; usage: wrong words get
one sentence. training/ (train, simulate, sweep), replay/, plan/, calibrate/, evaluate (and predict, export), data, bench/, see/
(inspect, plot, runs, report, watch, help).
"""
