"""Compare rtservice with other servers in one run: ``python -m benchmarks``.

Each server runs alone on one core, and the load generator on another. The servers are measured in turns, round after
round, so that other activity of the machine affects all of them. The most stable figure is the server's CPU time per
message, read from the kernel's clock of its processes. Ratios of two servers are computed within each round, and the
result is the median over the rounds.

Linux only. A server whose platform is missing (Go, Node, a C compiler, uvloop) is listed with the reason.
"""
