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
    mode: Literal["exchange", "churn", "idle"] = "exchange"
    """As in load.c: echo without end, a connection for each message, or connections that only stay open."""
    tls: bool = False

    @property
    def unit(self) -> str:
        """What is counted."""
        return "msg" if self.mode == "exchange" else "conn"


CASES = (
    Case("small", "64 B × 100 connections", connections=100),
    Case("medium", "1 KiB × 1,000 connections", connections=1000, size=1024),
    Case("large", "64 KiB × 100 connections", connections=100, size=65536),
    Case("ping-pong", "64 B × 1 connection", connections=1),
    Case("churn", "connect, greet, exchange 64 B, close × 16", connections=16, mode="churn"),
    Case("tls-small", "TLS, 64 B × 100 connections", connections=100, tls=True),
    Case("tls-large", "TLS, 16 KiB × 100 connections", connections=100, size=16384, tls=True),
    Case("idle", "5,000 idle connections", connections=5000, mode="idle"),
)
