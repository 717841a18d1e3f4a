"""The phases of a connection, and which may follow which."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """How far a connection has come. Logs, metrics and the status page show the value.

                         startTLS
                       ┌──────────┐
                       ▼          │
        PROXY ───────► TLS ─────► OPEN ─────► CLOSING
          │             │          ▲             ▲
          │   no TLS    │          │             │
          └─────────────┼──────────┘             │
                        └────────────────────────┘
                         failed, alert under way

    A listener decides whether its connections begin as PROXY, TLS or OPEN. A connection may end in each phase. Then it
    has the phase that it had come to before CLOSING.
    """

    PROXY = "proxy"  # the PROXY header has not come whole: no protocol is built, and nothing is sent
    TLS = "tls"  # the TLS handshake is not done: nothing of a protocol's is sent, and nothing is given to it
    OPEN = "open"  # the protocol is connected
    CLOSING = "closing"  # FIN is sent, and the last output is under way: what the peer still sends is dropped


# For the parts of a connection: in Python 3.11 each look-up of a member on its class is a call.
PROXY, TLS, OPEN, CLOSING = Phase

_MOVES = {
    PROXY: {TLS, OPEN},
    TLS: {OPEN, CLOSING},
    OPEN: {TLS, CLOSING},
    CLOSING: set[Phase](),
}


def next_phase(before: Phase, after: Phase) -> Phase:
    """Return the phase `after`. Raises RuntimeError if it cannot follow the phase `before`."""
    if after not in _MOVES[before]:
        raise RuntimeError(f"a connection in phase {before} cannot enter phase {after}")
    return after
