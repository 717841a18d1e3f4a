"""A TLS service and its clients, on loopback."""

import ssl
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from rtservice.net.tls import Context, ServerTLS
from tests.support.eventually import eventually
from tests.support.recording import Recording
from tests.support.timed_reactor import Timed
from tests.support.tls_service import Served


@pytest.fixture
def library() -> str:
    return "ssl"


@pytest.fixture
def contexts(certificates, library):
    """Create server contexts, by default with one certificate and default settings."""

    def make(name: str = "server", **settings: Any) -> Context:
        files = certificates[f"{name}.key"], certificates[f"{name}.pem"]
        return ServerTLS(*files, library=library, **settings).load().context

    return make


@pytest.fixture
def serve(contexts):
    """Serve a factory over TLS on a free loopback port."""
    started: list[Served] = []

    def start(factory: Recording, *, on: Any = reactor, timeout: float = 10.0, **settings: Any) -> Served:
        served = Served(factory, contexts(**settings), on, timeout)
        started.append(served)
        return served

    yield start
    for served in started:
        served.stop()

    # An aborted connection ends in a later event; on a fake clock it does not end by itself.
    def ended() -> bool:
        return all(
            len(served.opened) == len(served.closed) for served in started if not isinstance(served.port.reactor, Timed)
        )

    pytest_twisted.blockon(eventually(ended))
    for served in started:
        if isinstance(served.port.reactor, Timed):
            served.port.reactor.clock.advance(0)


@pytest.fixture
def client_context(certificates):
    """Create client contexts that trust the root and check the name."""

    def make(version: str = "", certificate: str = "", alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=certificates["ca.pem"])
        if version:
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        if certificate:
            context.load_cert_chain(certificates[f"{certificate}.pem"], certificates[f"{certificate}.key"])
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    return make
