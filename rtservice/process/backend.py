"""The two interfaces between the process and what it runs: `Backend` serves clients, and reports to its `Host`.

twistd ──→ ServiceProcess ──→ Backend: Server      serves in this process
                 ↑               │     WorkerPool  serves with worker processes
                 └──── Host ←────┘

worker process:  Worker ──→ Server, with the Worker as its Host
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.defer import Deferred

from rtservice.net.listener import Listener
from rtservice.process.counters import CounterKey
from rtservice.process.state import State

# Connections as `Registry.rows` returns them, each after the number of its worker; and workers that did not answer.
ConnectionRows = tuple[list[list[Any]], list[int]]


class Host(Protocol):
    """What a backend reports to."""

    def accepting(self) -> None:
        """Every listener accepts; endpoints may still be missing. Called once."""

    def ready(self) -> None:
        """The service accepts everywhere. Called once, after `accepting`."""

    def failed(self, problem: str) -> None:
        """The backend cannot serve what it was started for; `problem` is one line. The process is to end."""

    def draining(self) -> None:
        """The drain has begun, and `Backend.status` includes that."""

    def reloaded(self) -> None:
        """`Backend.replacing` has become false: a reload has reached every worker, or was given up."""

    def extend_timeout(self, seconds: float) -> None:
        """Ask the service manager for `seconds` from now, for the start or the stop in progress."""


class Backend(Protocol):
    """What serves the clients. Its calls come in this order: `prepare`, `start`, then any, and `drain` once."""

    listeners: list[Listener]

    @property
    def state(self) -> State:
        """The state of the service."""

    # --- start ---

    def prepare(self, host: Host) -> None:
        """Bind what only the backend can bind, before privileges are dropped. Raises ListenError."""

    def start(self, reactor: Any) -> None:
        """Begin to serve. `Host.ready` or `Host.failed` is called, now or later."""

    @property
    def signals(self) -> Mapping[int, Callable[[], None]]:
        """Signals beside those of ServiceProcess, and what to call for each in the reactor's thread."""

    # --- while it serves ---

    @property
    def tick_interval(self) -> float:
        """Seconds between two calls of `tick`, and two checks of the certificate files."""

    def tick(self) -> None:
        """Check what has to be checked regularly."""

    @property
    def alive(self) -> bool:
        """Whether the watchdog of the service manager is to be notified."""

    @property
    def watches_certificates(self) -> bool:
        """Whether certificates whose files have changed are to be loaded at this moment."""

    @property
    def replacing(self) -> bool:
        """Whether a reload still replaces processes. `Host.reloaded` is called when that is over."""

    # --- for the status server and the service manager ---

    @property
    def ready(self) -> bool:
        """Whether to send new clients here."""

    @property
    def status(self) -> str:
        """The state in one line. It may take a look at each connection."""

    @property
    def standing(self) -> str:
        """The state in one line, at a constant cost."""

    def snapshot(self, now: float, process: dict[CounterKey, float]) -> dict[str, Any]:
        """Return the keys `workers`, `supervisor`, `starts` and `exits` of the overview.

        `now` is time.time(), and `process` has the counters of this process.
        """

    def rows(self, sort: str, count: int) -> Deferred[ConnectionRows]:
        """Return `count` connections, ordered by the column `sort`, or in reverse by `-` and a column."""

    def refresh(self) -> Deferred[None]:
        """Have `snapshot` count the connections that are open now; fires when it does."""

    # --- stop ---

    @property
    def unready(self) -> str:
        """The reason to report when the service is stopped before it was ready."""

    @property
    def exits_at_once(self) -> bool:
        """Whether the process may end at any moment, and leaves no other process behind then."""

    def drain(self) -> Deferred[None]:
        """Accept no new clients, and give connections the drain timeout.

        Fires when the last one has ended, and every listening socket of the backend is closed.
        """

    def abort(self) -> None:
        """End the drain now, or have it end at once when it begins: connections that are still open are aborted."""
