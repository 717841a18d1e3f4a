"""The measured cases. To add a case, add a line to ``CASES``."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One kind of load, equal for all servers."""

    name: str
    """Name for ``--cases``."""
    title: str
    connections: int
    size: int = 64
    """Bytes in a message."""
    mode: Literal["exchange", "churn", "idle", "start"] = "exchange"
    """As in load.c: continuous echo, one connection per message, or idle connections. ``start`` has no load, and
    measures the start of the server until its first greeting."""
    tls: bool = False
    servers: tuple[str, ...] = ()
    """Names of the measured servers. Empty: all except ``workers``."""

    @property
    def unit(self) -> str:
        """Unit of the rate: message, connection or start."""
        return {"exchange": "msg", "start": "start"}.get(self.mode, "conn")

    @property
    def cost(self) -> str:
        """Unit of the cost."""
        return {"idle": "KiB", "start": "CPU ms"}.get(self.mode, "CPU µs")

    def takes(self, server: str) -> bool:
        """Return whether a server is measured in this case."""
        return server in self.servers if self.servers else server != "workers"


_WORKERS = ("rtservice", "workers")

CASES = (
    Case("small", "64 B × 100 connections", connections=100),
    Case("medium", "1 KiB × 1,000 connections", connections=1000, size=1024),
    Case("large", "64 KiB × 100 connections", connections=100, size=65536),
    Case("ping-pong", "64 B × 1 connection", connections=1),
    Case("churn", "connect, greet, exchange 64 B, close × 16", connections=16, mode="churn"),
    Case("tls-small", "TLS, 64 B × 100 connections", connections=100, tls=True),
    Case("tls-large", "TLS, 16 KiB × 100 connections", connections=100, size=16384, tls=True),
    Case("idle", "5,000 idle connections", connections=5000, mode="idle"),
    Case("workers", "64 B × 100, two processes on one core", connections=100, servers=_WORKERS),
    Case(
        "start", "from the command to the first greeting", connections=1, mode="start", servers=(*_WORKERS, "twisted")
    ),
)
