"""One serving process: its lifecycle, connections, limits, counters and signals."""
