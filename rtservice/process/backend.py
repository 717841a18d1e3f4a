"""The two interfaces between ServiceProcess and its backend: a `Backend` serves clients, and reports to its `Host`.

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

# Rows of `Registry.rows`, each preceded by the number of its worker; and the numbers of workers that did not answer.
ConnectionRows = tuple[list[list[Any]], list[int]]


class Host(Protocol):
    """What a backend reports to."""

    def accepting(self) -> None:
        """Every listener accepts; endpoints may still be missing. Called once."""

    def ready(self) -> None:
        """The service accepts everywhere. Called once, after `accepting`."""

    def failed(self, problem: str) -> None:
        """The backend cannot start, or cannot continue to serve. The process must end. `problem` is one line."""

    def draining(self) -> None:
        """The drain has begun. `Backend.status` already reports it."""

    def drained(self) -> None:
        """Every connection has ended, and every listener is closed. The factory is still to be stopped."""

    def reloaded(self) -> None:
        """`Backend.replacing` has become false: a reload has reached every worker, or has failed."""

    def extend_timeout(self, seconds: float) -> None:
        """Extend the service manager's timeout of the start or stop in progress to `seconds` from now."""


class Backend(Protocol):
    """Serves the clients. `prepare` is called first, then `start`. `drain` is called once."""

    listeners: list[Listener]

    @property
    def state(self) -> State:
        """The state of the service."""

    # --- start ---

    def prepare(self, host: Host) -> None:
        """Listen on endpoints that only the backend can bind, before privileges are dropped. Raises ListenError."""

    def start(self, reactor: Any) -> None:
        """Start to serve. Calls `Host.ready` or `Host.failed`, at once or later."""

    @property
    def signals(self) -> Mapping[int, Callable[[], None]]:
        """Handlers of signals that ServiceProcess does not handle, by number, to be called in the reactor's thread."""

    # --- while it serves ---

    @property
    def tick_interval(self) -> float:
        """Seconds between two calls of `tick`, and between two checks of the certificate files."""

    def tick(self) -> None:
        """Do the periodic checks."""

    @property
    def alive(self) -> bool:
        """Whether to send watchdog notifications to the service manager."""

    @property
    def watches_certificates(self) -> bool:
        """Whether to load certificates now if their files have changed."""

    @property
    def replacing(self) -> bool:
        """Whether a reload is still replacing workers. `Host.reloaded` is called at its end."""

    # --- for the status server and the service manager ---

    @property
    def ready(self) -> bool:
        """Whether the backend is ready for traffic."""

    @property
    def status(self) -> str:
        """The state in one line. The cost may grow with the number of connections."""

    @property
    def short_status(self) -> str:
        """The state in one line, in constant time."""

    def snapshot(self, now: float, process: dict[CounterKey, float]) -> dict[str, Any]:
        """Return the keys `workers`, `supervisor`, `starts` and `exits` of the overview.

        `now` is time.time(), and `process` has the counters of this process.
        """

    def rows(self, sort: str, count: int) -> Deferred[ConnectionRows]:
        """Return the first `count` connections in the order of `sort`, a column, with `-` before it for descending."""

    def refresh(self) -> Deferred[None]:
        """Update the counters of open connections for `snapshot`. Fires when they are current."""

    # --- stop ---

    @property
    def stopped_before_ready(self) -> str:
        """The problem to report if the service is stopped before it is ready."""

    @property
    def exits_at_once(self) -> bool:
        """Whether the process may exit at any time without leaving other processes behind."""

    def drain(self) -> Deferred[None]:
        """Stop accepting, and let open connections end within the drain timeout.

        Fires when the last connection has ended, and every listening socket of the backend is closed.
        """

    def abort(self) -> None:
        """Abort open connections, and so end the drain: now, or as soon as it begins."""
