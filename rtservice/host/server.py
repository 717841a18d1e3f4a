"""The lifecycle of one serving process: it adopts listening sockets, serves, and stops."""

from __future__ import annotations

from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, gatherResults, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from rtservice.host.connections import Connections
from rtservice.net.listeners import Listener
from rtservice.net.stream import Port


class StartError(SystemExit, Exception):
    """The service cannot start; the text is the one line for the user.

    Twistd tells the command that was typed, and removes the pidfile, for an Exception; the interpreter prints no
    traceback for a SystemExit. It has to be both.
    """


class Server(Service):
    """Serves one factory on listeners, which are bound already, and on endpoints of other kinds.

    `endpoints` are pairs of a description and an IStreamServerEndpoint. They start to listen before privileges are
    dropped.
    """

    name = "rtservice"

    def __init__(
        self,
        factory: Any,
        *,
        listeners: list[Listener],
        endpoints: list[tuple[str, Any]],
        handshake_timeout: float,
        log: Logger,
    ) -> None:
        self.factory = factory
        self.connections = Connections(log)
        self.ports: list[Any] = []
        self.exit_status = 0
        self._listeners = listeners
        self._endpoints = endpoints
        self._handshake_timeout = handshake_timeout
        self._log = log

    def privilegedStartService(self) -> None:
        """Listen where only an endpoint can: raises StartError, with an address that cannot be had."""
        super().privilegedStartService()
        endpoints, self._endpoints = self._endpoints, []
        for description, endpoint in endpoints:
            failures: list[Failure] = []
            started = maybeDeferred(endpoint.listen, self.connections.wrap(self.factory, description))
            started.addCallback(self._listening, description)
            started.addErrback(failures.append)
            if failures:
                problem = f"--listen {description}: {failures[0].getErrorMessage()}"
                self._log.critical("cannot start: {problem}", problem=problem)
                raise StartError(f"rtservice: {problem}")
            # From here on a failure comes when twistd has reported success already: stop, and exit non-zero.
            started.addBoth(self._late_failure, failures, description)

    def _listening(self, port: Any, description: str) -> None:
        self.ports.append(port)
        self._log.info("listening on {listener}", listener=f"{description} ({port.getHost()})")

    def _late_failure(self, result: object, failures: list[Failure], description: str) -> None:
        if failures:
            from twisted.internet import reactor

            self._log.critical(
                "cannot start: --listen {description}: {problem}",
                description=description,
                problem=failures[0].getErrorMessage(),
            )
            self.exit_status = 1
            reactor.stop()

    def startService(self) -> None:
        """Serve. The reactor is needed from here on."""
        from twisted.internet import reactor

        if self._endpoints:  # `twist` knows no privileged start
            self.privilegedStartService()
        super().startService()
        # Not before the reactor handles signals: whoever reads "listening" may send one, and would kill the process
        # before it can clean up. Clients that are early wait in the sockets' queues.
        reactor.callWhenRunning(self._serve, reactor)

    def _serve(self, reactor: Any) -> None:
        if not self.running:  # stopped before the reactor ran
            return
        for listener in self._listeners:
            port = Port(
                reactor,
                listener.socket,
                self.factory,
                name=listener.name,
                tls=listener.tls,
                handshake_timeout=self._handshake_timeout,
                opened=self.connections.opened,
                closed=self.connections.closed,
            )
            port.startListening()
            self.ports.append(port)
            self._log.info("listening on {listener}", listener=listener.name)

    def stopService(self) -> Deferred[Any]:
        """Stop to accept, close the listening sockets and remove their files."""
        super().stopService()
        stopping = [maybeDeferred(port.stopListening) for port in self.ports]
        self.ports = []
        return gatherResults(stopping, consumeErrors=True).addBoth(self._close_listeners)

    def _close_listeners(self, result: object) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            try:
                listener.close()
            except OSError as problem:
                # After privileges were dropped the directory may not be ours; the next start takes the file over.
                self._log.warn(
                    "{listener}: its socket file stays: {problem}", listener=listener.name, problem=problem.strerror
                )
