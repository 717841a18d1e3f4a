"""Measure the cases: every server in turn, round after round."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.build import UnavailableError
from benchmarks.cases import Case
from benchmarks.servers import Certificate, Running, Server, running

# Descriptors that a process needs beside those of its connections.
SPARE_DESCRIPTORS = 200


@dataclass(frozen=True)
class Figures:
    """Figures of one run. Latencies are in microseconds, shares are fractions of one core."""

    cost: float
    """Server CPU µs per message or connection, resident KiB per idle connection, or CPU ms of a start."""
    rate: float | None = None
    """Messages or connections per second."""
    p50: float | None = None
    p99: float | None = None
    p999: float | None = None
    server_busy: float | None = None
    load_busy: float | None = None
    strangers: float | None = None
    """Share of other programs on the server's or load's core, whichever is higher."""
    ready: float | None = None
    """Milliseconds from the command to readiness."""
    memory: float | None = None
    """MiB of memory after the start, with shared pages divided among processes (Pss of proc_pid_smaps(5))."""
    engine: float | None = None
    """CPU µs per delivery of Redis, which ``cost`` does not include."""


@dataclass
class Row:
    """The figures of one server in one case."""

    server: Server
    rounds: list[Figures | None] = field(default_factory=list)
    """Figures by round, so that servers can be compared within a round; None for a failed round."""
    missing: str | None = None
    """The reason of a failure, or None."""


@dataclass
class Result:
    """The figures of all servers in one case."""

    case: Case
    rows: list[Row]
    remarks: list[str]


@dataclass(frozen=True)
class Cores:
    """The cores of the server and of the load."""

    server: int
    load: int

    @property
    def shared(self) -> bool:
        """Whether both are the same core."""
        return self.server == self.load


def choose_cores() -> Cores:
    """Choose two of the cores that this process may use, if possible not two threads of one core."""
    usable = sorted(os.sched_getaffinity(0))
    server = usable[-1]  # interrupts are usually handled by the first core
    topology = Path(f"/sys/devices/system/cpu/cpu{server}/topology/thread_siblings_list")
    siblings = _numbers(topology.read_text()) if topology.exists() else set()
    others = [cpu for cpu in usable if cpu != server]
    apart = [cpu for cpu in others if cpu not in siblings]
    return Cores(server, (apart or others or [server])[-1])


def raise_descriptor_limit() -> int:
    """Raise the descriptor limit of this process and its children to the hard limit, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@dataclass
class Bench:
    """The common parameters of all runs."""

    cores: Cores
    seconds: float
    rounds: int
    directory: Path
    """Directory for the output of the servers."""
    certificate: Certificate | str
    """The certificate, or the reason why there is none."""
    descriptors: int

    def measure(self, case: Case, servers: list[Server], progress: Callable[[Row, int], None]) -> Result:
        """Measure all rounds of one case. ``progress`` is called after each run."""
        generator = load.find(tls=case.tls)
        rows = [Row(server) for server in servers]
        for number in range(self.rounds):
            for row in _turns(rows, number):
                row.rounds.append(None)
                # A server that failed is not measured again: it would fail for the same reason.
                if row.missing is None:
                    try:
                        row.rounds[-1] = self._run(case, row.server, generator)
                    except UnavailableError as reason:
                        row.missing = str(reason)
                progress(row, number)
        return Result(case, rows, [generator.remark] if generator.remark else [])

    def _run(self, case: Case, server: Server, generator: load.Load) -> Figures:
        certificate = None
        if case.tls:
            if not server.tls:
                raise UnavailableError("does not support TLS")
            if isinstance(self.certificate, str):
                raise UnavailableError(self.certificate)
            certificate = self.certificate
        if case.connections + SPARE_DESCRIPTORS > self.descriptors:
            raise UnavailableError(f"{case.connections} connections exceed {self.descriptors} descriptors")
        log = self.directory / f"{server.name}-{case.name}.log"
        with running(server, self.cores.server, log, certificate) as process:
            if case.mode == "start":
                return _start_figures(process)
            watch = _Watch(self.cores, [*process.pids, *process.engine_pids])
            answer = load.run(generator, case, process, self.cores.load, self.seconds)
            return _figures(case, answer, watch.strangers())


def _turns(rows: list[Row], number: int) -> Iterator[Row]:
    """Yield the rows in the order of a round. Each round begins with another server."""
    start = number % len(rows)
    yield from rows[start:] + rows[:start]


def _figures(case: Case, answer: dict[str, Any], strangers: float | None) -> Figures:
    if case.mode == "idle":
        return Figures(cost=answer["resident_kib_grown"] / answer["connections"], strangers=strangers)
    seconds = answer["seconds"]
    return Figures(
        cost=1e6 * answer["server_cpu_seconds"] / answer["messages"],
        rate=answer["messages"] / seconds,
        p50=answer["p50_us"],
        p99=answer["p99_us"],
        p999=answer["p999_us"],
        server_busy=answer["server_cpu_seconds"] / seconds,
        load_busy=answer["load_cpu_seconds"] / seconds,
        strangers=strangers,
        engine=1e6 * answer.get("engine_cpu_seconds", 0) / answer["messages"] or None,
    )


def _start_figures(process: Running) -> Figures:
    shares = [
        int(line.split()[1])
        for pid in process.pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    ]
    return Figures(cost=1e3 * _cpu_seconds(process.pids), ready=1e3 * process.started, memory=sum(shares) / 1024)


def _cpu_seconds(pids: list[int]) -> float:
    # CPUCLOCK_SCHED, as computed by clock_getcpuclockid(3).
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


class _Watch:
    """Measures the share of other programs, and of the host, on the two cores."""

    def __init__(self, cores: Cores, pids: list[int]) -> None:
        self._cores = cores
        self._pids = pids
        self._began = time.monotonic()
        self._before = self._sample()

    def strangers(self) -> float | None:
        """Return their share of the core that they used more, since the constructor; None if there is only one core."""
        if self._cores.shared:
            return None
        elapsed = time.monotonic() - self._began
        used = (after - before for before, after in zip(self._before, self._sample(), strict=True))
        return max(0.0, *used) / elapsed

    def _sample(self) -> list[float]:
        """Return the busy seconds of the server's core and of the load's core, without server and load."""
        server = _cpu_seconds(self._pids)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = _busy_seconds()
        return [busy[self._cores.server] - server, busy[self._cores.load] - ended.ru_utime - ended.ru_stime]


def _busy_seconds() -> dict[int, float]:
    """Return the busy seconds by CPU: user, nice, system, irq, softirq and steal time of proc_stat(5)."""
    ticks = os.sysconf("SC_CLK_TCK")
    busy = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])
            busy[int(name[3:])] = (user + nice + system + irq + softirq + steal) / ticks
    return busy


def _numbers(text: str) -> set[int]:
    """Parse a list of CPUs in the format of the kernel: ``0-1,4``."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
