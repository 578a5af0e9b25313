"""Pictures of runs, one or several: what is drawn, against what, by which hand.

against (seconds, steps, epochs, gradients of a moment) -> curves (what a run has to show, as numbers) -> panels (one set of axes
each, runs that repeat one another as a band) -> figure (panels side by side, legends, the file) -> report (a page: pictures,
numbers, advice).
"""
