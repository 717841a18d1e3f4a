"""A Server in a ServiceProcess, with fake listeners, endpoints and connections."""

from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.protocol import Factory
from twisted.logger import Logger, formatEvent
from twisted.python.failure import Failure

from rtservice.hub.hub import Hub
from rtservice.hub.local import LocalCarrier
from rtservice.net.phases import OPEN, Phase
from rtservice.process.admission import Limits
from rtservice.process.endpoints import Endpoints
from rtservice.process.server import RuntimeSettings, Server
from rtservice.process.service import ServiceProcess
from rtservice.process.status_server import StatusServer
from rtservice.protocols.echo import EchoFactory
from tests.support.launch import launch


class Endpoint:
    """An endpoint whose `listen` returns the given Deferred."""

    def __init__(self, result: Deferred) -> None:
        self.result = result
        self.stopped = 0

    def listen(self, factory: Factory) -> Deferred:
        self.factory = factory
        return self.result

    def getHost(self) -> str:
        return "an address"

    def stopListening(self) -> None:
        self.stopped += 1


def server(
    listeners=(),
    endpoints=(),
    drain_timeout=0.0,
    factory=None,
    reload: Any = None,
    carrier: Any = None,
    hub_required=False,
    **given: Any,
) -> tuple[ServiceProcess, list[dict[str, Any]]]:
    """Return a service whose backend is a Server, and its log events. `given` are fields of Launch."""
    events: list[dict[str, Any]] = []
    log = Logger(observer=events.append)
    made = Server(
        factory or EchoFactory(),
        listeners=list(listeners),
        settings=RuntimeSettings(
            limits=Limits(max_connections=100), drain_timeout=drain_timeout, hub_required=hub_required
        ),
        log=log,
        hub=Hub(carrier or LocalCarrier(), log),
        endpoints=Endpoints(list(endpoints), "--listen", log),
    )
    return ServiceProcess(made, reload, log=log, launch=launch(**given), status_server=StatusServer(log)), events


class Held:
    """A fake connection for the registry; records calls in `asked`."""

    unsent = bytes_in = bytes_out = 0
    seen, still_since, opened = -1, 0.0, 0.0
    disconnecting = peer_finished = False
    error = None
    port = SimpleNamespace(name="test")

    def __init__(self, service: ServiceProcess, phase: Phase = OPEN, protocol: Any = None) -> None:
        self.service = service
        self.connections = service.backend.connections
        self.phase = phase
        self.protocol = protocol
        self.asked: list[str] = []
        self.connections.opened(self)

    def getPeer(self) -> None:
        return None

    def close(self, why: str) -> None:
        self.asked.append(f"close: {why}")
        self.disconnecting = True

    def abort(self, why: str) -> None:
        self.asked.append(f"abort: {why}")
        self.service.reactor.callLater(0, self.closes, ConnectionAborted())

    def abortConnection(self) -> None:
        self.abort("abort")

    def closes(self, reason: Exception | None = None) -> None:
        self.connections.closed(self, Failure(reason or ConnectionDone()))


class Told:
    """A protocol that counts calls of `drain`."""

    def __init__(self) -> None:
        self.drains = 0

    def drain(self) -> None:
        self.drains += 1


def last(events: list[dict[str, Any]]) -> str:
    return str(formatEvent(events[-1]))
