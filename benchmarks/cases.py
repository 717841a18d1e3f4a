"""The measured cases. To add a case, add a line to ``CASES``."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.servers import Server


@dataclass(frozen=True)
class Case:
    """One kind of load, equal for all servers."""

    name: str
    """Name for ``--cases``."""
    title: str
    connections: int
    size: int = 64
    """Bytes in a message."""
    mode: Literal["exchange", "churn", "idle", "fanout", "start"] = "exchange"
    """As in load.c: continuous echo, one connection per message, idle connections, or lines that are sent to all
    connections. ``start`` has no load, and measures the start of the server until its first greeting."""
    tls: bool = False
    servers: tuple[str, ...] = ()
    """Names of the measured servers. Empty: all echo servers except ``workers``."""
    publishers: int = 1
    """Connections that send lines in ``fanout``, each with one line on its way."""

    @property
    def unit(self) -> str:
        """Unit of the rate: message, connection, delivery or start."""
        return {"exchange": "msg", "fanout": "delivery", "start": "start"}.get(self.mode, "conn")

    @property
    def cost(self) -> str:
        """Unit of the cost."""
        return {"idle": "KiB", "start": "CPU ms"}.get(self.mode, "CPU µs")

    @property
    def subject(self) -> str:
        """Name of the server with which the others are compared."""
        return "hub" if self.mode == "fanout" else "rtservice"

    def takes(self, server: Server) -> bool:
        """Return whether a server is measured in this case."""
        if self.servers:
            return server.name in self.servers
        return not server.broadcasts and server.name != "workers"


_WORKERS = ("rtservice", "workers")
_BROADCASTERS = (
    "hub",
    "hub-mesh",
    "hub-redis",
    "fan-asyncio",
    "fan-asyncio-redis",
    "fan-node",
    "fan-node-redis",
)
# 200 connections: 100 in each of two processes.
_HALVES = ("hub", "hub-mesh", "hub-redis-2", "fan-asyncio-redis-2", "fan-node-redis-2")

CASES = (
    Case("small", "64 B × 100 connections", connections=100),
    Case("medium", "1 KiB × 1,000 connections", connections=1000, size=1024),
    Case("large", "64 KiB × 100 connections", connections=100, size=65536),
    Case("ping-pong", "64 B × 1 connection", connections=1),
    Case("churn", "connect, greet, exchange 64 B, close × 16", connections=16, mode="churn"),
    Case("tls-small", "TLS, 64 B × 100 connections", connections=100, tls=True),
    Case("tls-large", "TLS, 16 KiB × 100 connections", connections=100, size=16384, tls=True),
    Case("idle", "5,000 idle connections", connections=5000, mode="idle"),
    Case("fanout", "64 B to 500 connections", connections=500, mode="fanout", servers=_BROADCASTERS),
    Case(
        "fanout-busy",
        "64 B to 500, 16 publishers",
        connections=500,
        mode="fanout",
        servers=_BROADCASTERS,
        publishers=16,
    ),
    Case("fanout-two", "64 B to 200, in two processes", connections=200, mode="fanout", servers=_HALVES),
    Case("workers", "64 B × 100, two processes on one core", connections=100, servers=_WORKERS),
    Case(
        "start", "from the command to the first greeting", connections=1, mode="start", servers=(*_WORKERS, "twisted")
    ),
)
