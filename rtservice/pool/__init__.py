"""Many worker processes: the supervisor, its control channel, and what a worker runs."""
