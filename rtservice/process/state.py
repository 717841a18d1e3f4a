"""The states of a service, with or without workers, and their transitions.

STARTING ──→ SERVING ──→ DRAINING ──→ STOPPED
    ├────────────────────→┘              ↑
    └────────────────────────────────────┘
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """The state of a service."""

    STARTING = "starting"  # sockets are bound, and queue clients
    SERVING = "serving"  # every listener accepts
    DRAINING = "draining"  # no new clients; open connections have a limited time to end
    STOPPED = "stopped"  # no connection, no listener


_MOVES = {
    State.STARTING: {State.SERVING, State.DRAINING, State.STOPPED},
    State.SERVING: {State.DRAINING},
    State.DRAINING: {State.STOPPED},
    State.STOPPED: set[State](),
}


def advance(state: State, following: State) -> State:
    """Return the state `following`. Raises RuntimeError if it cannot follow `state`."""
    if following not in _MOVES[state]:
        raise RuntimeError(f"a process that is {state.value} cannot become {following.value}")
    return following
