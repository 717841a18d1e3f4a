"""One run, and the order of runs: every server in turn, round after round, for each case."""

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

# Descriptors that a process needs besides its connections.
SPARE_DESCRIPTORS = 200


@dataclass(frozen=True)
class Figures:
    """What one run measured. Times are in microseconds, shares are of one core."""

    cost: float
    """The steady figure: server CPU µs per message or connection; resident KiB of an idle one; CPU ms of a start."""
    rate: float | None = None
    """Messages or connections per second."""
    p50: float | None = None
    p99: float | None = None
    p999: float | None = None
    server_busy: float | None = None
    load_busy: float | None = None
    strangers: float | None = None
    """How busy other programs kept the two cores meanwhile, the busier of them."""
    ready: float | None = None
    """Milliseconds of a start."""
    memory: float | None = None
    """MiB that it takes then, what processes share divided among them (Pss of proc_pid_smaps(5))."""


@dataclass
class Row:
    """One server in one case, over the rounds."""

    server: Server
    rounds: list[Figures | None] = field(default_factory=list)
    """By round, so that servers can be compared within one; None where a round failed."""
    missing: str | None = None
    """Why there is nothing, or not everything."""


@dataclass
class Result:
    """One case, measured."""

    case: Case
    rows: list[Row]
    remarks: list[str]


@dataclass(frozen=True)
class Cores:
    """Where the server runs and where the load runs."""

    server: int
    load: int

    @property
    def shared(self) -> bool:
        """There is only one."""
        return self.server == self.load


def choose_cores() -> Cores:
    """Two cores of those this process may use, not two threads of one core if that can be helped."""
    usable = sorted(os.sched_getaffinity(0))
    server = usable[-1]  # interrupts tend to go to the first one
    topology = Path(f"/sys/devices/system/cpu/cpu{server}/topology/thread_siblings_list")
    siblings = _numbers(topology.read_text()) if topology.exists() else set()
    others = [cpu for cpu in usable if cpu != server]
    apart = [cpu for cpu in others if cpu not in siblings]
    return Cores(server, (apart or others or [server])[-1])


def raise_descriptor_limit() -> int:
    """Allow this process and its children as many descriptors as the system grants, and say how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@dataclass
class Bench:
    """Everything that the runs have in common."""

    cores: Cores
    seconds: float
    rounds: int
    directory: Path
    """For the servers' output."""
    certificate: Certificate | str
    """Or why there is none."""
    descriptors: int

    def measure(self, case: Case, servers: list[Server], progress: Callable[[Row, int], None]) -> Result:
        """All rounds of one case; tells ``progress`` after each run."""
        generator = load.find(tls=case.tls)
        rows = [Row(server) for server in servers]
        for number in range(self.rounds):
            for row in _turns(rows, number):
                row.rounds.append(None)
                # What failed once for a reason will fail again: no minute is spent on finding that out.
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
                raise UnavailableError("does not speak TLS")
            if isinstance(self.certificate, str):
                raise UnavailableError(self.certificate)
            certificate = self.certificate
        if case.connections + SPARE_DESCRIPTORS > self.descriptors:
            raise UnavailableError(f"{case.connections} connections exceed {self.descriptors} descriptors")
        log = self.directory / f"{server.name}-{case.name}.log"
        with running(server, self.cores.server, log, certificate) as process:
            if case.mode == "start":
                return _start_figures(process)
            watch = _Watch(self.cores, process.pids)
            answer = load.run(generator, case, process, self.cores.load, self.seconds)
            return _figures(case, answer, watch.strangers())


def _turns(rows: list[Row], number: int) -> Iterator[Row]:
    """The order of a round: each begins with another server, so that none is always measured first."""
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
    # CPUCLOCK_SCHED, as made by clock_getcpuclockid(3).
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


class _Watch:
    """What keeps the two cores busy that is neither server nor load: other programs, or the host's share."""

    def __init__(self, cores: Cores, pids: list[int]) -> None:
        self._cores = cores
        self._pids = pids
        self._began = time.monotonic()
        self._before = self._sample()

    def strangers(self) -> float | None:
        """Their share of the core that they used more, since this was made; None with one core for all."""
        if self._cores.shared:
            return None
        elapsed = time.monotonic() - self._began
        used = (after - before for before, after in zip(self._before, self._sample(), strict=True))
        return max(0.0, *used) / elapsed

    def _sample(self) -> list[float]:
        """Seconds used up on the server's core and on the load's, without server and load."""
        server = _cpu_seconds(self._pids)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = _busy_seconds()
        return [busy[self._cores.server] - server, busy[self._cores.load] - ended.ru_utime - ended.ru_stime]


def _busy_seconds() -> dict[int, float]:
    """By CPU, how long it was not idle: user, nice, system, irq, softirq and steal time of proc_stat(5)."""
    ticks = os.sysconf("SC_CLK_TCK")
    busy = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *counts = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _, _, irq, softirq, steal = map(int, counts[:8])
            busy[int(name[3:])] = (user + nice + system + irq + softirq + steal) / ticks
    return busy


def _numbers(text: str) -> set[int]:
    """A list of CPUs as the kernel writes it: ``0-1,4``."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
