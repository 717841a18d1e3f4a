"""The phases of a connection and their transitions."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """The phase of a connection. Logs, metrics and the status page show the value.

                         startTLS
                       ┌──────────┐
                       ▼          │
        PROXY ───────► TLS ─────► OPEN ─────► CLOSING
          │             │          ▲             ▲
          │   no TLS    │          │             │
          └─────────────┼──────────┘             │
                        └────────────────────────┘
                        failed, alert in flight

    A listener determines whether its connections begin in PROXY, TLS or OPEN. A connection may end in any phase. After
    the end it has its last phase before CLOSING.
    """

    PROXY = "proxy"  # the PROXY header is incomplete: no protocol is built, and nothing is sent
    TLS = "tls"  # the TLS handshake is not done: the protocol sends and receives nothing
    OPEN = "open"  # the protocol is connected
    CLOSING = "closing"  # FIN is sent and the last output is in flight: input is discarded


# Module constants for the hot path: in Python 3.11 each look-up of a member on its class is a call.
PROXY, TLS, OPEN, CLOSING = Phase

_MOVES = {
    PROXY: {TLS, OPEN},
    TLS: {OPEN, CLOSING},
    OPEN: {TLS, CLOSING},
    CLOSING: set[Phase](),
}


def next_phase(before: Phase, after: Phase) -> Phase:
    """Return the phase `after`. Raises RuntimeError if it is not a valid transition from `before`."""
    if after not in _MOVES[before]:
        raise RuntimeError(f"a connection in phase {before} cannot enter phase {after}")
    return after
