"""Load with arrival times of its own (open model): ``python -m loadtest run|knee|report|compare --help``."""
