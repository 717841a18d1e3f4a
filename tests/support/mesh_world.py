"""Workers with a hub on a mesh, in one process: real sockets, and a reactor for each worker that the test runs."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import Logger

from rtservice.hub.hub import Hub
from rtservice.hub.mesh import MeshCarrier
from rtservice.pool.mesh_links import LinkChannel, MeshLinks


class SteppedReactor(Clock):
    """A reactor whose descriptors are called by the test, in an order that does not depend on their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[Any, None] = {}
        self.writers: dict[Any, None] = {}

    def addReader(self, reader: Any) -> None:
        self.readers[reader] = None

    def removeReader(self, reader: Any) -> None:
        self.readers.pop(reader, None)

    def addWriter(self, writer: Any) -> None:
        self.writers[writer] = None

    def removeWriter(self, writer: Any) -> None:
        self.writers.pop(writer, None)

    def call(self, descriptor: Any, method: str) -> None:
        reason = getattr(descriptor, method)()
        if reason is not None:
            self.removeReader(descriptor)
            self.removeWriter(descriptor)
            descriptor.connectionLost(reason)

    def turn(self) -> None:
        """Call everything once."""
        self.advance(0)
        for reader in list(self.readers):
            if reader in self.readers:
                self.call(reader, "doRead")
        for writer in list(self.writers):
            if writer in self.writers:
                self.call(writer, "doWrite")


class MeshWorker:
    """A worker: its reactor, its hub, and the MeshHost of its carrier."""

    def __init__(self, world: "MeshWorld", name: int) -> None:
        self.world = world
        self.name = name
        self.reactor = SteppedReactor()
        self.channel = LinkChannel(world.reactor)
        self.reports: list[tuple[int, str]] = []
        self.failures: list[str] = []
        self.carrier = MeshCarrier(self.channel.inherited.detach(), self, Logger())
        self.hub = Hub(self.carrier, Logger())
        self.hub.start(self.reactor)

    def join_mesh(self) -> None:
        self.world.mesh.add(self.channel)

    def report_peer(self, incarnation: int, problem: str) -> None:
        self.reports.append((incarnation, problem))

    def failed(self, problem: str) -> None:
        self.failures.append(problem)


class MeshWorld:
    """The supervisor and the workers."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.reactor = SteppedReactor()  # of the supervisor
        self.mesh = MeshLinks()
        self.workers: list[MeshWorker] = []
        self._spawned = 0

    def spawn(self) -> MeshWorker:
        self._spawned += 1
        worker = MeshWorker(self, self._spawned)
        self.workers.append(worker)
        return worker

    def spawn_all(self, count: int) -> list[MeshWorker]:
        """Spawn workers, and wait until they are linked."""
        workers = [self.spawn() for _ in range(count)]
        self.settle()
        assert all(worker.carrier.up for worker in workers)
        return workers

    def kill(self, worker: MeshWorker) -> None:
        """End the process of a worker: the kernel closes its sockets."""
        self.workers.remove(worker)
        for link in [*worker.reactor.readers]:
            (getattr(link, "_socket", None) or link._channel).close()
        self.mesh.remove(worker.channel)

    def stop(self, worker: MeshWorker) -> None:
        """Stop the hub of a worker, then end its process."""
        stopped: list[Any] = []
        worker.hub.stop().addCallback(stopped.append)
        for _ in range(1000):
            if stopped:
                break
            worker.reactor.turn()
        assert stopped
        assert not worker.reactor.readers
        assert not worker.reactor.writers
        assert not worker.reactor.getDelayedCalls()
        self.workers.remove(worker)
        self.mesh.remove(worker.channel)

    def settle(self, turns: int = 100) -> None:
        """Run all reactors until everything is handled."""
        for _ in range(turns):
            self.reactor.turn()
            for worker in list(self.workers):
                if worker in self.workers:
                    worker.reactor.turn()

    def step(self) -> None:
        """Call a random descriptor or the timers of a random worker."""
        worker = self.random.choice(self.workers)
        reactor = worker.reactor
        calls: list[Callable[[], None]] = [lambda: reactor.advance(0)]
        calls += [partial(reactor.call, reader, "doRead") for reader in reactor.readers]
        calls += [partial(reactor.call, writer, "doWrite") for writer in reactor.writers]
        self.random.choice(calls)()

    def close(self) -> None:
        for worker in list(self.workers):
            self.kill(worker)
