"""The example of a protocol on the hub, docs/examples/live.py, in two processes without a reactor."""

import importlib.util
import re
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.logger import Logger
from twisted.python.failure import Failure

from rtservice.hub.hub import Hub
from tests.support.chat import ManualReactor
from tests.support.hub_engine import Engine, EngineCarrier
from tests.support.repository import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "live.py"


class World:
    """Two processes that serve the example."""

    def __init__(self, latency: float) -> None:
        spec: Any = importlib.util.spec_from_file_location("live", EXAMPLE)
        live = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(live)
        self.clock = ManualReactor()
        self.engine = Engine(self.clock, latency)
        self.carriers = [EngineCarrier(self.engine) for _ in range(2)]
        self.factories = []
        for carrier in self.carriers:
            hub = Hub(carrier, Logger(observer=lambda event: None))
            hub.start(self.clock)
            factory = live.Live()
            factory.use(hub)
            self.factories.append(factory)

    def connect(self, process: int) -> Any:
        protocol = self.factories[process].buildProtocol(None)
        protocol.makeConnection(StringTransport())
        return protocol

    def send(self, protocol: Any, *lines: str) -> None:
        protocol.dataReceived("".join(f"{line}\n" for line in lines).encode())
        self.clock.settle()


def received(protocol: Any) -> list[str]:
    """Return the lines that a client has received since the last call, without the numbers of guests."""
    text = re.sub("guest-[0-9a-f]{6}", "guest", protocol.transport.value().decode())
    protocol.transport.clear()
    return text.splitlines()


@pytest.fixture(params=[0.0, 0.01], ids=["without latency", "with latency"])
def world(request) -> World:
    return World(request.param)


def test_the_example_has_fewer_than_60_lines() -> None:
    assert len([line for line in EXAMPLE.read_text().splitlines() if line]) < 60


def test_a_line_goes_to_the_clients_of_all_processes(world) -> None:
    ann, bob = world.connect(0), world.connect(1)
    world.clock.settle()
    assert received(ann) == received(bob) == ["* welcome, guest"]
    world.send(ann, "hello\r", "/who")
    assert received(bob) == ["guest: hello"]
    assert sorted(received(ann)) == ["* 2 here, such as guest guest", "guest: hello"]


def test_a_client_that_leaves_is_forgotten_at_any_time(world) -> None:
    for seconds in (0.0, 0.01, 1.0):
        ann = world.connect(0)
        world.clock.settle(seconds)
        ann.connectionLost(Failure(ConnectionDone()))
        world.clock.settle()
        assert world.factories[0].hub.topics() == []
        assert len(world.engine.presence) == 0


def test_gaps_and_failures_show_a_notice(world) -> None:
    ann = world.connect(0)
    world.clock.settle()
    received(ann)
    world.engine.disconnect()
    world.send(ann, "hello", "/who")
    assert received(ann) == ["* not possible now, try again later"] * 2
    world.engine.connect()
    world.send(ann, "hello")
    assert received(ann) == ["* lines may be missing here", "guest: hello"]


def test_a_client_that_does_not_read_skips_lines(world) -> None:
    ann, slow = world.connect(0), world.connect(1)
    world.clock.settle()
    received(slow)
    slow.transport.producer.pauseProducing()
    world.send(ann, "one", "two", "three")
    assert received(slow) == []
    slow.transport.producer.resumeProducing()
    world.send(ann, "four")
    assert received(slow) == ["* 3 lines were skipped here", "guest: four"]
