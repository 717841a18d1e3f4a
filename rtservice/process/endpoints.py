"""Listen on endpoints of Twisted or of a plugin, for descriptions whose type rtservice does not provide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from rtservice.events import LISTENER_LISTENING, LISTENER_STOP_FAILED
from rtservice.net.description import ListenError


class Endpoints:
    """Listens on endpoints, before privileges are dropped.

    `endpoints` are pairs of a description and an IStreamServerEndpoint. Errors begin with `setting`.
    """

    def __init__(self, endpoints: Sequence[tuple[str, Any]], setting: str, log: Logger) -> None:
        self.awaited = 0  # endpoints that do not listen yet
        self._endpoints = list(endpoints)
        self._setting = setting
        self._log = log
        self._ports: list[Any] = []
        self._stopped = False

    def listen(
        self, factory: Callable[[str], Any], listening: Callable[[], None], failed: Callable[[str], None]
    ) -> None:
        """Listen on every endpoint. A second call does nothing.

        `factory` returns the factory for a description. `listening` is called for each endpoint that listens. Raises
        ListenError if an endpoint fails at once. If it fails later, `failed` is called with the problem.
        """
        endpoints, self._endpoints = self._endpoints, []
        for description, endpoint in endpoints:
            failures: list[Failure] = []
            self.awaited += 1
            started = maybeDeferred(endpoint.listen, factory(description))
            started.addCallback(self._listening, description, listening)
            started.addErrback(failures.append)
            if failures:
                raise ListenError(self._problem(description, failures[0]))
            started.addBoth(self._fail_late, failures, description, failed)

    def _listening(self, port: Any, description: str, listening: Callable[[], None]) -> None:
        self.awaited -= 1
        if self._stopped:
            port.stopListening()
            return
        self._ports.append(port)
        LISTENER_LISTENING.log(self._log, listener=f"{description} ({port.getHost()})")
        listening()

    def _fail_late(
        self, result: object, failures: list[Failure], description: str, failed: Callable[[str], None]
    ) -> None:
        if failures and not self._stopped:
            failed(self._problem(description, failures[0]))

    def _problem(self, description: str, failure: Failure) -> str:
        return f"{self._setting} {description}: {failure.getErrorMessage()}"

    def stop(self) -> None:
        """Stop listening."""
        self._stopped = True
        ports, self._ports = self._ports, []
        for port in ports:
            maybeDeferred(port.stopListening).addErrback(self._not_stopped)

    def _not_stopped(self, failure: Failure) -> None:
        LISTENER_STOP_FAILED.failure(self._log, failure)
