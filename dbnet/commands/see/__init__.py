"""Look at what is there: `runs` (inspect, plot, runs, report, watch), `reference` (help), `checks` (check), `doctor`."""
