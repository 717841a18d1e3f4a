"""Signals that trigger faults in a worker with programs/worker_signals on its path."""

import signal

BLOCK, DIE, FAIL, GROW, RAMBLE, FLOOD = (signal.SIGRTMIN + place for place in range(6))
