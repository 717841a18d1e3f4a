"""From the command line to a running service: checks, listening sockets, outputs and the start report."""
