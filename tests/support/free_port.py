"""A free TCP port."""

import contextlib
import random
import socket

# Below 32768, where the ports of outgoing connections begin: ip(7), ip_local_port_range. Redis Cluster also needs the
# port that is 10,000 higher.
PORTS = range(10_000, 22_768)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of this address that was free a moment ago.

    No outgoing connection takes it before a server listens, or while the server restarts, and a connection to it cannot
    connect to itself.
    """
    chooser = random.SystemRandom()
    while True:
        port = chooser.choice(PORTS)
        with contextlib.suppress(OSError), socket.create_server((host, port)):
            return port
