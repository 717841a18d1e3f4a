"""rtservice beside its peers, measured in one run: ``python -m benchmarks``.

Each server runs alone on one core, the load on another, and the servers take turns, round after round, so
that whatever the machine does meanwhile happens to all of them. The steady figure is the CPU time that a
server spends on one message, read from the kernel's clock of its processes; the ratio of two servers is taken
within each round, and the median of the rounds is what counts.

Linux only. What is not there (Go, Node, a C compiler, uvloop) is left out of the table, with the reason.
"""
