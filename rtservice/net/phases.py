"""The phases of a connection, and which may follow which."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """How far a connection has come. Logs, metrics and the status page show the value.

    A connection begins in the first phase that its listener asks for, and may end in each:

        accepted ──► PROXY ──► TLS ──► OPEN ──► CLOSING ──► ended
           │           │      ▲ ▲ │    ▲ ▲ │      ▲
           │           │      │ │ └────┼─┼─┼──────┘  (a failed handshake whose alert is under way)
           │           └──────┼─┼──────┘ │ │
           ├──────────────────┘ └────────┼─┘         (startTLS)
           └─────────────────────────────┘           (no PROXY header, no TLS)
    """

    PROXY = "proxy"  # the PROXY header has not come whole: no protocol is built, and nothing is sent
    TLS = "tls"  # the TLS handshake is not done: nothing of a protocol's is sent, and nothing is given to it
    OPEN = "open"  # the protocol is connected
    CLOSING = "closing"  # FIN is sent, and the last output is under way: what the peer still sends is dropped


_MOVES = {
    Phase.PROXY: {Phase.TLS, Phase.OPEN},
    Phase.TLS: {Phase.OPEN, Phase.CLOSING},
    Phase.OPEN: {Phase.TLS, Phase.CLOSING},
    Phase.CLOSING: set[Phase](),
}


def next_phase(before: Phase, after: Phase) -> Phase:
    """Return the phase `after`. Raises RuntimeError if it cannot follow the phase `before`."""
    if after not in _MOVES[before]:
        raise RuntimeError(f"a connection in phase {before} cannot enter phase {after}")
    return after
