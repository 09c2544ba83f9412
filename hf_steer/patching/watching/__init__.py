"""For those who want to see: traces, attention probes, and what a model would look at."""
