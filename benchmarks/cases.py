"""What is measured. A new case is one more line in ``CASES``."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One kind of load, the same for every server."""

    name: str
    """What ``--cases`` takes."""
    title: str
    connections: int
    size: int = 64
    """Bytes in a message."""
    mode: Literal["exchange", "churn", "idle", "start"] = "exchange"
    """As in load.c: echo without end, a connection for each message, or connections that only stay open; or, without a
    load, the start of the server until it greets."""
    tls: bool = False
    servers: tuple[str, ...] = ()
    """Who takes part. Empty: everybody but ``workers``."""

    @property
    def unit(self) -> str:
        """What is counted."""
        return {"exchange": "msg", "start": "start"}.get(self.mode, "conn")

    @property
    def cost(self) -> str:
        """What is counted for each of them."""
        return {"idle": "KiB", "start": "CPU ms"}.get(self.mode, "CPU µs")

    def takes(self, server: str) -> bool:
        """Whether a server takes part."""
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
