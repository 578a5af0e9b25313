"""Look at what is there: `runs` (inspect, plot, runs, report, watch), `timeline` (trace), `reference`, `checks`, `doctor`."""
