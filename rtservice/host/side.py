"""What a process serves beside the service itself: few clients, and it stays until the end."""

from __future__ import annotations

from typing import Any

from twisted.logger import Logger

from rtservice.host.connections import Connections, Limits
from rtservice.net.listeners import Listener
from rtservice.net.stream import Port

# A scraper, a load balancer's probes, a few people: more has no business here. An HTTP client that asks nothing for so
# many seconds is closed.
LIMITS = Limits(max_connections=100, at_limit="reject", idle_timeout=30.0)


class Side:
    """Serves `factory` on listeners of its own, with limits of its own; without any, it does nothing and is false.

    Its connections count nowhere in the service's own.
    """

    def __init__(self, log: Logger, listeners: list[Listener] | None = None) -> None:
        self._log = log
        self.listeners = listeners or []
        self.factory: Any = None
        # Whoever asks each second is not to be a line each second.
        self._connections = Connections(Logger(observer=_nobody), LIMITS)  # type: ignore[arg-type]  # a function is one
        self._ports: list[Port] = []

    def __bool__(self) -> bool:
        return bool(self.listeners)

    def start(self, reactor: Any) -> None:
        """Serve."""
        if not self:
            return
        self._connections.start(reactor)
        for listener in self.listeners:
            port = Port(
                reactor,
                listener.socket,
                self.factory,
                name=listener.name,
                tls=listener.tls,
                opened=self._connections.opened,
                identified=self._connections.identified,
                closed=self._connections.closed,
            )
            self._ports.append(port)
            port.startListening()
            self._log.info("status on {listener}", listener=listener.name)

    def served(self) -> list[tuple[Listener, Port]]:
        """Its listeners, each with the port that accepts on it, once it serves."""
        return list(zip(self.listeners, self._ports, strict=False))

    def stop(self) -> None:
        """Serve no more, and close the sockets."""
        for port in self._ports:
            port.stopListening()
        self._connections.cut_all("cut off")
        self._connections.stop()
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            try:
                listener.close()
            except OSError as problem:
                self._log.warn(
                    "{listener}: its socket file stays: {problem}", listener=listener.name, problem=problem.strerror
                )


def _nobody(event: object) -> None:
    """Takes records that nobody wants."""
