"""Several processes that serve as one: what clients, operators and the service manager see of it, whatever dies."""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from twisted import plugins

GREETING = b"Hello from the server!"
DEADLINE = 30
TCP = "--listen=tcp:0:interface=127.0.0.1"


# --- processes ---


def children(pid: int) -> list[int]:
    """The processes that this one has started and not reaped."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def born(pid: int) -> str:
    """When a process was started, which with its number makes it the only one; empty when there is none.

    A zombie, which nobody has reaped, is none.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def alive(pid: int) -> bool:
    return born(pid) != ""


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def sockets_of(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(entry.path))
    return {link[len("socket:[") : -1] for link in found if link.startswith("socket:[")}


def accepted_by(pid: int, clients: list[socket.socket]) -> list[socket.socket]:
    """Those clients of 127.0.0.1 whose connections this process has accepted."""
    inodes = sockets_of(pid)
    ends = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ends[fields[1], fields[2]] = fields[9]  # the inode is 0 until it is accepted

    def is_there(client: socket.socket) -> bool:
        near, far = (f"0100007F:{name[1]:04X}" for name in (client.getsockname(), client.getpeername()))
        return ends[far, near] in inodes

    return [client for client in clients if is_there(client)]


def freeze(pid: int, wait_for: Callable[..., Any]) -> None:
    """Stop a process as it stands: what comes for it waits in the kernel."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


class Workers:
    """A `twistd rtservice` with workers."""

    def __init__(self, service: Any, wait_for: Callable[..., Any]) -> None:
        self.service = service
        self.pid: int = service.process.pid
        self._wait_for = wait_for
        self._seen: dict[int, str] = {}
        self.pids()

    def pids(self) -> list[int]:
        """The workers, the oldest first."""
        found = children(self.pid)
        self._seen |= {pid: born(pid) for pid in found}
        return found

    def left(self) -> list[int]:
        """Of all its workers that were ever looked at, those that are there."""
        return [pid for pid, when in self._seen.items() if when and born(pid) == when]

    def of_slot(self, slot: int) -> int:
        """The one that was ready in a slot last."""
        lines = [line for line in self.service.lines if re.search(rf"worker {slot} \(pid \d+\) is ready", line)]
        return int(lines[-1].partition("(pid ")[2].partition(")")[0])

    def send(self, number: int) -> None:
        self.service.process.send_signal(number)

    def ready(self) -> list[int]:
        """The workers that serve or have served, the oldest first."""
        ready = r"worker \d+ \(pid (\d+)\) is ready"
        said = {int(match[1]) for line in list(self.service.lines) if (match := re.search(ready, line))}
        return [pid for pid in self.pids() if pid in said]

    def settled(self, count: int) -> list[int]:
        """The workers, when there are so many, and all of them serve."""

        def are_ready() -> list[int]:
            found = self.pids()
            return found if len(found) == count and self.ready() == found else []

        return list(self._wait_for(are_ready))

    def wait_line(self, pattern: str, count: int = 1) -> str:
        return str(self.service.wait_line(pattern, count))

    def lines(self, pattern: str) -> list[str]:
        return [line for line in list(self.service.lines) if re.search(pattern, line)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.pids()
        status = int(self.service.stop(number))
        assert self.left() == []
        return status


@pytest.fixture
def workers(service, wait_for) -> Iterator[Callable[..., Workers]]:
    """Starts a service with two workers, or as many as the arguments say; at the end, no process may be left."""
    started: list[Workers] = []

    def start(*arguments: str, **more: Any) -> Workers:
        if not any(argument.startswith("--workers") for argument in arguments):
            arguments = ("--workers=2", *arguments)
        one = Workers(service(*arguments, **more), wait_for)
        started.append(one)
        return one

    yield start
    for one in started:
        if one.service.process.poll() is None:
            one.pids()
            one.send(signal.SIGTERM)
            one.send(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.service.process.wait(DEADLINE)
    left = [pid for one in started for pid in one.left()]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert left == []


# What a process does to itself for a signal, since only its own Python can block its reactor, or fail in it.
SITE = """
import signal, sys
if "rtservice.pool.worker" in sys.orig_argv:
    def blocked_by_its_protocol(number, frame):
        while True:
            pass
    def dies(number, frame):
        import os
        print("these are\\x1b its last words", file=sys.stderr)
        sys.stderr.write("unfinished")
        sys.stderr.flush()
        os.abort()
    def fails(number, frame):
        from twisted.logger import Logger
        try:
            1 / 0
        except ZeroDivisionError:
            Logger(namespace="some.protocol").failure("it failed for {peer}", peer="somebody", answer=42)
        Logger(namespace="some.protocol").warn("a warning with {fields}", fields=["a", 1], of=object())
    def grows(number, frame):
        global memory
        memory = bytearray(200 << 20)
        memory[::4096] = b"x" * len(memory[::4096])
    def rambles(number, frame):
        import os
        os.write(4, b"no such word\\n")
    def floods(number, frame):
        from twisted.logger import Logger
        log = Logger(namespace="some.protocol")
        for count in range(50_000):
            log.info("a flood of {count}", count=count)
    for place, action in enumerate((blocked_by_its_protocol, dies, fails, grows, rambles, floods)):
        signal.signal(signal.SIGRTMIN + place, action)
"""
BLOCK, DIE, FAIL, GROW, RAMBLE, FLOOD = (signal.SIGRTMIN + place for place in range(6))

# A setting that only a worker finds to be wrong, while there is a file called `broken`.
BROKEN_SITE = """
import os, sys
if "rtservice.pool.worker" in sys.orig_argv and os.path.exists(os.environ["BROKEN"]):
    from rtservice.protocols import echo
    def refuse(self, *arguments):
        raise ValueError("broken by design")
    echo.EchoFactory.__init__ = refuse
"""


@pytest.fixture
def site(tmp_path) -> dict[str, str]:
    """The environment in which a worker takes BLOCK, DIE and so on."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    return {"PYTHONPATH": str(tmp_path / "site")}


@pytest.fixture
def broken_site(tmp_path) -> dict[str, str]:
    """The environment in which a worker finds a setting wrong while there is a file `broken`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BROKEN_SITE)
    return {"PYTHONPATH": str(tmp_path / "site"), "BROKEN": str(tmp_path / "broken")}


class Manager:
    """A NOTIFY_SOCKET, and every message that came through it, in order."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def _record(self) -> None:
        while message := self._socket.recv(4097):
            self.messages.append(message.decode())

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.path)
        self._thread.join(DEADLINE)
        self._socket.close()


@pytest.fixture
def manager(tmp_path) -> Iterator[Manager]:
    one = Manager(f"{tmp_path}/notify")
    yield one
    one.close()


# --- clients ---


class Load:
    """The clients of load.py, with these arguments for its `Clients`. To be used in a `with`."""

    def __init__(self, **arguments: Any) -> None:
        program = Path(__file__).with_name("load.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def count(self) -> dict[str, Any]:
        """What it has counted so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def more(self, connections: int) -> None:
        """Wait until so many more connections have ended well."""
        wanted = self.count()["ok"] + connections
        end = time.monotonic() + DEADLINE
        while (count := self.count())["ok"] < wanted:
            assert time.monotonic() < end, count
            threading.Event().wait(0.02)

    def stop(self) -> dict[str, Any]:
        """Have every client end its connection; gives the last count."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self._answer()
        self._process.wait(DEADLINE)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def assert_nobody_lost(count: dict[str, Any]) -> None:
    assert {**count, "ok": 0, "p50": 0, "p99": 0, "longest": 0} == {
        **{"ok": 0, "refused": 0, "reset": 0, "cut": 0, "silent": 0, "lost": 0},
        **{"p50": 0, "p99": 0, "longest": 0, "problems": []},
    }


def connect(address: Any) -> socket.socket:
    """A blocking client of a TCP port of 127.0.0.1, of an IPv6 address, or of the path of a UNIX socket."""
    families = {str: socket.AF_UNIX, int: socket.AF_INET, tuple: socket.AF_INET6}
    client = socket.socket(families[type(address)])
    client.settimeout(DEADLINE)
    try:
        client.connect(("127.0.0.1", address) if isinstance(address, int) else address)
    except OSError:
        client.close()
        raise
    return client


def is_greeted(client: socket.socket) -> bool:
    return client.recv(len(GREETING), socket.MSG_WAITALL) == GREETING


def greeted(address: Any) -> socket.socket:
    client = connect(address)
    assert is_greeted(client)
    return client


def echoes(client: socket.socket, data: bytes = b"hello") -> bool:
    """Whether a message comes back; False at the end of the connection, however it came."""
    try:
        client.sendall(data)
        return client.recv(len(data), socket.MSG_WAITALL) == data
    except ConnectionError:
        return False


# --- replacing workers, under load ---


def test_reloads_lose_nobody(workers) -> None:
    one = workers(TCP)
    before = set(one.pids())
    with Load(port=one.service.port, short=32, long=32) as load:
        load.more(100)
        for count in range(1, 11):
            one.send(signal.SIGHUP)
            one.wait_line("reloaded: serving: 2 of 2 workers ready", count=count)
        load.more(100)
        assert_nobody_lost(load.stop())
    assert not before & set(one.settled(2))
    assert len(one.lines("is ready")) == 22
    assert one.stop() == 0


def test_more_and_fewer_workers_lose_nobody(workers) -> None:
    one = workers(TCP)
    with Load(port=one.service.port, short=32, long=32) as load:
        load.more(100)
        for count in range(1, 11):
            one.send(signal.SIGTTIN)
            one.wait_line(r"worker 2 \(pid \d+\) is ready", count=count)
            load.more(50)
            one.send(signal.SIGTTOU)
            one.wait_line("slot 2 is gone", count=count)
        load.more(100)
        count = load.stop()
        assert_nobody_lost(count)
        assert count["longest"] < 1  # nobody had to send a SYN twice, or to wait for a worker that starts
    one.settled(2)
    assert one.stop() == 0


def test_one_more_and_one_less_at_once_change_nothing_in_the_end(workers) -> None:
    one = workers(TCP)
    with Load(port=one.service.port, short=8, long=8) as load:
        for _ in range(3):
            one.send(signal.SIGTTIN)
            one.send(signal.SIGTTOU)
            load.more(100)
        assert_nobody_lost(load.stop())
    one.settled(2)


def test_a_worker_that_is_killed_as_it_leaves_is_replaced_until_its_queue_is_served(workers, wait_for) -> None:
    one = workers(TCP)
    port = one.service.port
    first, last = one.of_slot(0), one.of_slot(1)
    clients = [greeted(port) for _ in range(40)]
    freeze(last, wait_for)
    queued = [connect(port) for _ in range(40)]
    one.send(signal.SIGTTOU)
    os.kill(last, signal.SIGCONT)
    one.wait_line("worker 1\\] draining")
    wait_for(lambda: len(accepted_by(first, queued)) + len(accepted_by(last, queued)) == 40)
    freeze(last, wait_for)
    os.kill(last, signal.SIGKILL)
    one.wait_line(r"worker 1 \(pid \d+\) is ready", count=2)
    one.wait_line("slot 1 is gone")
    for client in (*clients, *queued):
        client.close()
    one.send(signal.SIGTTIN)
    one.wait_line(r"worker 1 \(pid \d+\) is ready", count=3)
    began = time.monotonic()
    clients = [greeted(port) for _ in range(40)]
    assert time.monotonic() - began < 1  # nobody sent a SYN twice
    assert 0 < len(accepted_by(one.of_slot(1), clients)) < 40
    for client in clients:
        client.close()
    assert one.stop() == 0


def test_workers_may_be_added_and_removed_for_ever(workers, wait_for) -> None:
    one = workers(TCP)
    one.send(signal.SIGHUP)  # a start holds the terminal until it is over
    one.wait_line("reloaded: ")
    one.settled(2)
    before = descriptors(one.pid)
    for count in range(1, 13):
        one.send(signal.SIGTTIN)
        one.wait_line(r"worker 2 \(pid \d+\) is ready", count=count)
        one.send(signal.SIGTTOU)
        one.wait_line("slot 2 is gone", count=count)
    wait_for(lambda: descriptors(one.pid) <= before)
    assert one.stop() == 0


def test_the_last_worker_stays(workers) -> None:
    one = workers(TCP)
    one.send(signal.SIGTTOU)
    one.wait_line("slot 1 is gone")
    one.send(signal.SIGTTOU)
    one.wait_line("SIGTTOU: the last worker stays")
    with greeted(one.service.port) as client:
        assert echoes(client)
    one.settled(1)


def test_a_worker_that_is_told_to_end_is_replaced_first(workers) -> None:
    one = workers(TCP)
    with Load(port=one.service.port, short=16, long=16) as load:
        load.more(100)
        for _ in range(3):
            old = one.settled(2)[0]
            os.kill(old, signal.SIGTERM)
            one.wait_line(rf"worker \d \(pid {old}\) has ended$")
        assert_nobody_lost(load.stop())
    assert one.stop() == 0


def test_workers_that_reach_their_age_are_replaced_one_at_a_time_and_nobody_is_lost(workers) -> None:
    one = workers("--workers=3", "--max-worker-age=2", TCP)
    with Load(port=one.service.port, short=16, long=16) as load:
        one.wait_line("has reached its age", count=6)
        assert_nobody_lost(load.stop())
    events = one.lines("has reached its age|is ready")[3:]
    ages = ["age" in line for line in events]
    assert ages[::2] == [True] * len(ages[::2])
    assert ages[1::2] == [False] * len(ages[1::2])
    assert one.stop() == 0


def test_a_worker_that_has_grown_is_replaced_and_nobody_is_lost(workers, site) -> None:
    one = workers("--max-worker-memory=150", TCP, **site)
    grown = one.of_slot(0)
    with Load(port=one.service.port, short=16, long=16) as load:
        load.more(50)
        os.kill(grown, GROW)
        assert int(re.search(r"has (\d+) MiB of memory", one.wait_line(rf"\(pid {grown}\) has \d+ MiB"))[1]) > 200
        one.wait_line(rf"\(pid {grown}\) has ended$")
        assert_nobody_lost(load.stop())
    assert len(one.lines("MiB of memory")) == 1


# --- workers that die ---


def test_of_a_killed_worker_only_its_open_connections_are_lost(workers, wait_for) -> None:
    one = workers(TCP)
    port = one.service.port
    victim, other = one.settled(2)
    clients = [greeted(port) for _ in range(40)]
    doomed = accepted_by(victim, clients)
    assert 5 < len(doomed) < 35

    freeze(victim, wait_for)
    queued = [connect(port) for _ in range(40)]
    os.kill(victim, signal.SIGKILL)
    one.wait_line(rf"worker \d \(pid {victim}\) has ended")
    later = [connect(port) for _ in range(40)]

    assert [client for client in clients if not echoes(client)] == doomed
    assert all(is_greeted(client) and echoes(client) for client in (*queued, *later))
    # There was somebody in the queue of the dead.
    assert len(accepted_by(other, queued)) < len(queued)
    one.settled(2)
    for client in (*clients, *queued, *later):
        client.close()
    assert one.stop() == 0


def test_while_a_worker_is_dead_or_silent_new_clients_are_served_by_the_others(workers, broken_site, tmp_path) -> None:
    one = workers("--workers=3", TCP, **broken_site)
    victim, silent, other = one.settled(3)
    (tmp_path / "broken").touch()
    os.kill(victim, signal.SIGKILL)
    one.wait_line("gets a new worker in .*: --protocol echo: broken by design", count=3)
    os.kill(silent, signal.SIGSTOP)
    try:
        wait = threading.Event()
        wait.wait(4)  # by then it has been silent for three seconds, which nothing but a clock tells
        clients = [greeted(one.service.port) for _ in range(40)]
    finally:
        os.kill(silent, signal.SIGCONT)
    assert accepted_by(other, clients) == clients
    for client in clients:
        client.close()
    (tmp_path / "broken").unlink()
    one.settled(3)
    assert one.stop() == 0


def test_who_is_queued_for_a_dead_worker_is_served_when_the_service_stops(workers, broken_site, tmp_path) -> None:
    one = workers(TCP, **broken_site)
    victim, other = one.settled(2)
    (tmp_path / "broken").touch()
    os.kill(victim, signal.SIGSTOP)
    os.kill(other, signal.SIGSTOP)
    clients = [connect(one.service.port) for _ in range(40)]
    os.kill(victim, signal.SIGKILL)
    one.wait_line("gets a new worker in .*: --protocol echo: broken by design", count=3)
    (tmp_path / "broken").unlink()
    one.send(signal.SIGTERM)
    os.kill(other, signal.SIGCONT)
    assert all(is_greeted(client) and echoes(client) for client in clients)
    assert 0 < len(accepted_by(other, clients)) < 40
    for client in clients:
        client.close()
    assert one.service.process.wait(DEADLINE) == 0


def test_a_frozen_worker_is_replaced_within_the_hang_timeout(workers, wait_for) -> None:
    one = workers("--hang-timeout=2", TCP)
    victim = one.of_slot(0)
    freeze(victim, wait_for)
    clients = [connect(one.service.port) for _ in range(20)]
    line = one.wait_line(rf"worker 0 \(pid {victim}\) gave no sign of life for .* s: it is to print its stack")
    assert 2 <= float(re.search(r"for ([0-9.]+) s:", line)[1]) < 4
    one.wait_line(rf"worker 0 \(pid {victim}\) has ended: .*signal 9")
    assert all(is_greeted(client) for client in clients)
    for client in clients:
        client.close()
    one.settled(2)
    assert one.stop() == 0


def test_the_stack_of_a_blocked_worker_is_in_the_log_before_it_is_replaced(workers, site) -> None:
    one = workers("--hang-timeout=2", TCP, **site)
    victim = one.of_slot(1)
    os.kill(victim, BLOCK)
    one.wait_line(rf"worker 1 \(pid {victim}\) gave no sign of life")
    one.wait_line(rf"worker 1 \(pid {victim}\) printed: .*in blocked_by_its_protocol")
    one.wait_line(rf"worker 1 \(pid {victim}\) has ended: .*signal 9")
    one.settled(2)
    assert one.stop() == 0


def test_a_worker_that_rambles_harms_only_itself(workers, site) -> None:
    one = workers(TCP, **site)
    victim = one.of_slot(0)
    os.kill(victim, RAMBLE)
    one.wait_line(rf"worker 0 \(pid {victim}\) violated the control protocol, and is killed: .*'no'")
    one.settled(2)
    assert one.stop() == 0


def test_the_death_of_the_parent_is_the_end_of_its_workers_once_their_clients_have_ended(
    workers, tmp_path, wait_for
) -> None:
    one = workers(TCP, "--listen=unix:s")
    port, pids = one.service.port, one.settled(2)
    clients = [*(greeted(port) for _ in range(10)), *(greeted(f"{tmp_path}/s") for _ in range(10))]
    for pid in pids:
        freeze(pid, wait_for)
    queued = [*(connect(port) for _ in range(10)), *(connect(f"{tmp_path}/s") for _ in range(10))]
    one.service.process.kill()
    one.service.process.wait()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert all(is_greeted(client) for client in queued)
    wait_for(lambda: not (tmp_path / "s").exists())
    for client in (*clients, *queued):
        assert echoes(client)
        client.close()
    wait_for(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_the_death_of_the_parent_is_survived_by_nobody_for_longer_than_the_drain_timeout(workers, wait_for) -> None:
    one = workers("--drain-timeout=1", TCP)
    pids = one.settled(2)
    with greeted(one.service.port) as client:
        one.service.process.kill()
        assert client.recv(1) == b""
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_workers_that_never_became_ready_do_not_outlive_their_parent(service, environment, tmp_path, wait_for) -> None:
    command = [str(Path(sys.executable).with_name("twistd")), "-n", "--pidfile=", "rtservice", "--workers=3", TCP]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        pids = wait_for(lambda: (found := children(process.pid)) and len(found) == 3 and found)
        process.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.timeout(300)
def test_whatever_happens_to_workers_the_service_is_there_afterwards(workers, manager, wait_for) -> None:
    chance = random.Random(5)
    one = workers("--workers=3", "--hang-timeout=1", "--drain-timeout=5", TCP, NOTIFY_SOCKET=manager.path)
    port = one.service.port
    wait_for(lambda: manager.messages and "3 of 3" in manager.messages[-1])
    before = descriptors(one.pid)

    def slots(ready: bool = True) -> int:
        """How many there are; 0 unless all are ready, if that is asked for."""
        serving = re.search(r"serving: (\d+) of (\d+) workers ready", manager.messages[-1])
        return int(serving[2]) if serving and (serving[1] == serving[2] or not ready) else 0

    # More than the minute that a slot without a worker may have to wait.
    with Load(port=port, short=50, long=50, seed=5, patience=90) as load:
        load.more(100)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            what = chance.choice((signal.SIGKILL, signal.SIGSTOP, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU))
            # One that is stopped as it starts would only be missed after a minute.
            pids = one.ready() if what == signal.SIGSTOP else one.pids()
            if what in (signal.SIGKILL, signal.SIGSTOP):
                if pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), what)
            elif not (what == signal.SIGTTIN and slots(ready=False) > 4):
                one.send(what)
            threading.Event().wait(0.1)
        while not slots():
            assert time.monotonic() < end + 80, "\n".join(one.lines("worker|slot")[-50:])
            threading.Event().wait(0.1)
        load.more(200)
        count = load.stop()
    assert count["refused"] == count["silent"] == 0, count
    assert count["ok"] > 1000, count
    assert one.service.process.poll() is None

    def settled_slots() -> int:
        """How many there are, when nothing that was asked for is still to be done."""
        return slots() if len(set(manager.messages[-3:])) == 1 else 0

    now = wait_for(settled_slots)
    for number in [signal.SIGTTOU] * (now - 3) + [signal.SIGTTIN] * (3 - now):
        now += 1 if number == signal.SIGTTIN else -1
        one.send(number)
        wait_for(lambda now=now: slots() == now)
    began = time.monotonic()
    for _ in range(100):
        with greeted(port) as client:
            assert echoes(client)
    assert time.monotonic() - began < 5
    one.settled(3)
    wait_for(lambda: descriptors(one.pid) <= before)
    assert one.stop() == 0


# --- the stop ---


@pytest.mark.parametrize("whom", ["the parent", "all processes"])
def test_a_stop_resets_nobody(workers, whom) -> None:
    one = workers(TCP)
    with Load(port=one.service.port, short=32, long=32) as load:
        load.more(100)
        for pid in (one.pid, *(one.pids() if whom == "all processes" else ())):
            os.kill(pid, signal.SIGTERM)
        assert one.service.process.wait(DEADLINE) == 0
        count = load.stop()
    assert count["refused"] > 0
    assert count["reset"] == count["cut"] == count["silent"] == count["lost"] == 0, count
    assert one.lines(r"\[rtservice#info\] drained: \d+ ended, 0 aborted")


LISTEN = (TCP, "--listen=tcp6:0", "--listen=unix:s")


def addresses_of(one: Workers, directory: Path) -> list[Any]:
    """Where it can be reached: IPv4, IPv6, and a path."""
    lines = [one.wait_line(rf"listening on tcp:{host}:\d+$") for host in (r"127\.0\.0\.1", r"\[::\]")]
    port, port6 = (int(line.rpartition(":")[2]) for line in lines)
    return [port, ("::1", port6, 0, 0), f"{directory}/s"]


def assert_a_successor_takes_over(workers: Callable[..., Workers], addresses: list[Any], wait_for: Any) -> Workers:
    """New clients of a service that drains are refused, and another serves on the same addresses."""

    def refused(address: Any) -> bool:
        try:
            connect(address).close()  # when it is not told yet, or its signal has not come
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        return False

    for address in addresses:
        wait_for(lambda address=address: refused(address))
    port, (_, port6, *_), path = addresses
    listen = f"--listen=tcp:{port}:interface=127.0.0.1", f"--listen=tcp6:{port6}", f"--listen=unix:{path}"
    successor = workers(*listen)
    for address in addresses:
        greeted(address).close()
    return successor


def test_who_comes_during_a_drain_is_refused_and_a_successor_can_listen(workers, tmp_path, wait_for) -> None:
    one = workers(*LISTEN)
    addresses = addresses_of(one, tmp_path)
    # Sockets that were taken from the spares, and given back.
    one.send(signal.SIGTTIN)
    one.wait_line(r"worker 2 \(pid \d+\) is ready")
    one.send(signal.SIGTTOU)
    one.wait_line("slot 2 is gone")
    pids = one.settled(2)
    old = [greeted(address) for address in addresses]
    idle = next(pid for pid in pids if not accepted_by(pid, old[:1]))
    one.send(signal.SIGINT)
    one.wait_line(r"worker \d\] draining: ", count=3)
    os.kill(idle, signal.SIGKILL)  # it is not replaced, and nobody has its sockets
    successor = assert_a_successor_takes_over(workers, addresses, wait_for)
    assert echoes(old[0])
    assert one.service.process.poll() is None
    for client in old:
        client.close()
    assert one.service.process.wait(DEADLINE) == 0
    for address in addresses:  # the file of the path is the successor's
        greeted(address).close()
    assert successor.stop() == 0


@pytest.mark.parametrize("change", ["reloaded", "replaced", "reduced"])
def test_workers_that_were_being_replaced_when_all_stopped_keep_no_address(workers, tmp_path, wait_for, change) -> None:
    one = workers(*LISTEN)
    addresses = addresses_of(one, tmp_path)
    pids = one.settled(2)
    clients = [greeted(address) for address in addresses * 10]  # some of each worker's
    match change:
        case "reloaded":  # the old workers drain
            one.send(signal.SIGHUP)
            one.wait_line(r"worker \d\] draining: ", count=2)
        case "replaced":  # successors start
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            wait_for(lambda: len(one.pids()) > 2)
        case "reduced":  # the last slot drains
            one.send(signal.SIGTTOU)
            one.wait_line(r"worker 1\] draining: ")
    one.send(signal.SIGTERM)
    successor = assert_a_successor_takes_over(workers, addresses, wait_for)
    assert all(echoes(client) for client in clients)
    for client in clients:
        client.close()
    assert one.service.process.wait(DEADLINE) == 0
    assert one.left() == []
    for address in addresses:
        greeted(address).close()
    assert successor.stop() == 0


def test_a_second_signal_ends_the_drain(workers, wait_for) -> None:
    one = workers(TCP)
    with greeted(one.service.port) as client:
        one.send(signal.SIGTERM)
        one.wait_line("draining: 1 connection")
        assert echoes(client)
        # Those of the first half second are the first one once more.
        wait_for(lambda: one.send(signal.SIGTERM) or one.lines("SIGTERM: not waiting any longer"))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert one.service.process.wait(DEADLINE) == 128 + signal.SIGTERM
    one.wait_line(r"\[rtservice#info\] drained: 0 ended, 1 aborted")


# --- the spread ---


def test_connections_one_after_another_are_spread_evenly(workers, wait_for) -> None:
    one = workers("--workers=4", TCP)
    port = one.service.port
    for _ in range(800):
        with greeted(port) as client:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    wait_for(lambda: len(one.lines("bytes in")) == 800)
    counts = Counter(re.search(r"worker (\d)", line)[1] for line in one.lines("bytes in"))
    assert len(counts) == 4
    assert max(counts.values()) <= 1.5 * min(counts.values()), counts


# --- sockets of every kind ---


@pytest.fixture
def privileged_port() -> int:
    """A free port below 1024."""
    if os.getuid() != 0:
        pytest.skip("only root can bind a privileged port and change the user")
    for port in range(1023, 600, -1):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("every port below 1024 is in use")


def nobody_can_run(interpreter: str) -> bool:
    try:
        result = subprocess.run([interpreter, "-c", "import ssl"], user="nobody", group="nogroup", cwd="/", check=False)
    except OSError:
        return False
    return result.returncode == 0


@pytest.fixture
def run_for_all(environment) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs twistd with an interpreter and packages that every user can run and read; the tests' own may be root's."""
    interpreters = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
    interpreter = next(filter(nobody_can_run, interpreters), None)
    if interpreter is None:
        pytest.skip("no interpreter of the version of this one that the user nobody can run")
    with tempfile.TemporaryDirectory() as name:
        packages = Path(name)
        packages.chmod(0o755)
        for module in ("twisted", "zope.interface", "attr", "attrs", "automat", "constantly", "hyperlink", "idna"):
            copy_package(module, packages)
        for module in ("incremental", "typing_extensions", "rtservice"):
            copy_package(module, packages)
        plugin = next(Path(place) / "rtservice_plugin.py" for place in plugins.__path__ if has_plugin(Path(place)))
        shutil.copy(plugin, packages / "twisted" / "plugins")

        def run(*arguments: str) -> subprocess.CompletedProcess:
            twistd = [interpreter, "-c", "from twisted.scripts.twistd import run; run()"]
            env = {**environment, "PYTHONPATH": name}
            # Groups of root's, which nobody else is to have.
            groups = [4, 27] if os.getuid() == 0 else None
            return subprocess.run(
                [*twistd, *arguments], env=env, capture_output=True, text=True, timeout=DEADLINE, extra_groups=groups
            )

        yield run


def has_plugin(directory: Path) -> bool:
    return (directory / "rtservice_plugin.py").exists()


def copy_package(module: str, to: Path) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin)
    target = to / module.replace(".", "/")
    if source.name == "__init__.py":
        shutil.copytree(source.parent, target, ignore=shutil.ignore_patterns("test", "__pycache__"))
    else:
        shutil.copy(source, to)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every user can reach and write; pytest's own are the user's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_a_daemon_of_another_user_has_workers_a_privileged_port_and_a_key_that_only_root_reads(
    run_for_all, public_directory, privileged_port, certificates, wait_for
) -> None:
    here, port = public_directory, privileged_port
    shutil.copy(certificates["server.pem"], here)
    shutil.copy(certificates["server.key"], here)
    (here / "server.key").chmod(0o600)
    log = here / "d.log"
    log.touch()
    shutil.chown(log, "nobody")  # or twistd could not rotate it
    result = run_for_all(
        *(f"--pidfile={here}/d.pid", f"--logfile={log}", f"--rundir={here}", "--uid=nobody", "--gid=nogroup"),
        *("rtservice", "--workers=2", "--listen=unix:s:mode=666"),
        f"--listen=ssl:{port}:interface=127.0.0.1:privateKey=server.key:certKey=server.pem",
    )
    assert (result.returncode, result.stderr) == (0, "")
    pid = int((here / "d.pid").read_text())  # the command returns when all of it serves
    pids = children(pid)
    try:
        wait_for(lambda: "listening on" in log.read_text())
        assert len(pids) == 2
        for process in (pid, *pids):
            status = Path(f"/proc/{process}/status").read_text()
            assert set(re.search(r"Uid:(.*)", status)[1].split()) == {"65534"}
            assert set(re.search(r"Gid:(.*)", status)[1].split()) == {"65534"}
            assert set(re.search(r"Groups:(.*)", status)[1].split()) == {"65534"}
        with (
            Load(port=port, short=4, long=4, ca=certificates["ca.pem"]) as load,
            Load(path=f"{here}/s", short=4, long=4) as local,
        ):
            load.more(20)
            for count in range(1, 4):
                os.kill(pid, signal.SIGTTIN)
                wait_for(lambda count=count: len(re.findall("worker 2 .* is ready", log.read_text())) == count)
                load.more(20)
                os.kill(pid, signal.SIGTTOU)
                wait_for(lambda count=count: len(re.findall("slot 2 is gone", log.read_text())) == count)
            pids = children(pid)
            os.kill(pid, signal.SIGHUP)
            # Nobody of these can read the key: whoever serves, serves on.
            line = wait_for(lambda: re.search("nothing is reloaded: .*", log.read_text()))[0]
            assert "server.key" in line
            load.more(20)
            os.kill(pid, signal.SIGUSR1)
            wait_for(lambda: (here / "d.log.1").exists())
            load.more(20)
            wait_for(lambda: "bytes in" in log.read_text())
            assert_nobody_lost(load.stop())
            assert_nobody_lost(local.stop())
        assert children(pid) == pids
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not any(alive(process) for process in (pid, *pids)))
    assert {path.name for path in here.iterdir()} == {"d.log", "d.log.1", "server.pem", "server.key"}
    assert re.search(r"\[rtservice#info\] drained: \d+ ended, 0 aborted", log.read_text())
    assert len(re.findall(r"worker \d\] drained: ", log.read_text())) == 2


def test_more_slots_than_were_bound_before_privileges_were_dropped_are_refused(
    run_for_all, public_directory, privileged_port, wait_for
) -> None:
    here = public_directory
    log = here / "d.log"
    result = run_for_all(
        *(f"--pidfile={here}/d.pid", f"--logfile={log}", f"--rundir={here}", "--uid=nobody", "rtservice"),
        *("--workers=2", f"--listen=tcp:{privileged_port}:interface=127.0.0.1"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    pid = int((here / "d.pid").read_text())
    pids = children(pid)
    try:
        for process in (pid, *pids):
            status = Path(f"/proc/{process}/status").read_text()
            for field in ("Uid", "Gid", "Groups"):  # without --gid
                assert set(re.search(rf"{field}:(.*)", status)[1].split()) == {"65534"}
        for slot in range(2, 10):
            os.kill(pid, signal.SIGTTIN)
            wait_for(lambda slot=slot: f"worker {slot} " in log.read_text())
        os.kill(pid, signal.SIGTTIN)
        wait_for(lambda: re.search("no worker can be added: tcp:.* has no reserve socket left: 8 ", log.read_text()))
        pids = wait_for(lambda: len(found := children(pid)) == 10 and found)
        for _ in range(20):
            greeted(privileged_port).close()
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not any(alive(process) for process in (pid, *pids)))


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="systemd-socket-activate (Debian: systemd) is not installed",
)
def test_sockets_of_a_service_manager_are_shared_by_the_workers(workers, tmp_path, wait_for) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = f"{tmp_path}/activated"
    knocker = threading.Thread(target=lambda: (wait_for(lambda: os.path.exists(path)), greeted(path).close()))
    knocker.start()  # whoever comes first starts the service
    activate = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-l", path, "-E", "PYTHONUNBUFFERED=1"]
    one = workers("--listen=systemd:", launcher=activate)
    knocker.join(DEADLINE)
    with Load(port=port, short=16, long=16) as load, Load(path=path, short=16, long=16) as local:
        for count in range(1, 4):
            load.more(30)
            local.more(30)
            one.send(signal.SIGHUP)
            one.wait_line("reloaded: ", count=count)
            one.send(signal.SIGTTIN)
            one.wait_line(r"worker 2 \(pid \d+\) is ready", count=count)
            one.send(signal.SIGTTOU)
            one.wait_line("slot 2 is gone", count=count)
        assert_nobody_lost(load.stop())
        assert_nobody_lost(local.stop())
    assert one.stop() == 0
    assert os.path.exists(path)


def test_reloads_lose_nobody_with_tls_after_a_proxy_header_and_on_a_unix_socket(
    workers, certificates, tmp_path
) -> None:
    tls = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    one = workers(f"--listen=proxy:ssl:0:interface=127.0.0.1:{tls}", "--listen=unix:s")
    port = int(one.wait_line("listening on proxy:ssl:").rpartition(":")[2])
    with (
        Load(port=port, short=8, long=8, ca=certificates["ca.pem"], proxied=True) as load,
        Load(path=f"{tmp_path}/s", short=8, long=8) as local,
    ):
        for count in range(1, 4):
            load.more(20)
            one.send(signal.SIGHUP)
            one.wait_line("reloaded: ", count=count)
        assert_nobody_lost(load.stop())
        assert_nobody_lost(local.stop())
    one.wait_line(r"worker \d\] 192\.0\.2\.1:4711 on proxy:ssl:")
    assert one.stop() == 0
    assert not (tmp_path / "s").exists()


def test_a_renewed_certificate_is_shown_by_every_worker_after_a_reload(workers, certificates, tmp_path) -> None:
    for name in ("server.pem", "server.key"):
        shutil.copy(certificates[name], tmp_path)
    one = workers("--listen=ssl:0:interface=127.0.0.1:privateKey=server.key:certKey=server.pem")
    for name in ("pem", "key"):
        shutil.copy(certificates[f"rsa.{name}"], tmp_path / f"server.{name}")
    one.send(signal.SIGHUP)
    one.wait_line(r"worker \d\] draining: ", count=2)
    wanted = ssl.PEM_cert_to_DER_cert(Path(certificates["rsa.pem"]).read_text())
    context = ssl.create_default_context(cafile=certificates["ca.pem"])
    for _ in range(20):
        with context.wrap_socket(connect(one.service.port), server_hostname="localhost") as client:
            assert client.getpeercert(binary_form=True) == wanted
    assert one.stop() == 0


# --- the start, and settings ---


@pytest.mark.parametrize(
    "twistd", [["-n", "--pidfile="], ["--pidfile=d.pid", "--logfile=d.log"]], ids=["fore", "daemon"]
)
def test_a_worker_that_cannot_start_stops_the_start_with_its_reason(
    run, environment, broken_site, tmp_path, wait_for, twistd
) -> None:
    (tmp_path / "broken").touch()
    environment |= broken_site
    result = run(*twistd, "rtservice", "--workers=2", "--listen=unix:s")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[0] == "rtservice: --protocol echo: broken by design"
    assert len(result.stderr.splitlines()) == (1 if "-n" in twistd else 3)  # twistd says where its log is
    wait_for(lambda: not (tmp_path / "d.pid").exists())  # a daemon says why before it ends
    assert not (tmp_path / "s").exists()


def test_a_new_worker_that_cannot_start_leaves_the_old_ones_serving(workers, broken_site, tmp_path) -> None:
    one = workers(TCP, **broken_site)
    pids = one.settled(2)
    with Load(port=one.service.port, short=8, long=8) as load:
        (tmp_path / "broken").touch()
        one.send(signal.SIGHUP)
        one.wait_line(
            r"workers are not replaced: worker 0 \(pid \d+\) cannot take over: --protocol echo: broken by design"
        )
        load.more(50)
        assert one.settled(2) == pids
        (tmp_path / "broken").unlink()
        one.send(signal.SIGHUP)
        one.wait_line("reloaded: serving: 2 of 2 workers ready")
        assert_nobody_lost(load.stop())
    assert not set(one.settled(2)) & set(pids)


def test_a_reload_with_a_mistake_changes_nothing(workers, tmp_path) -> None:
    config = tmp_path / "rt.toml"
    config.write_text("idle-timeout = 60\n")
    one = workers("--config=rt.toml", TCP)
    pids = one.settled(2)
    config.write_text("idle-timeout = 1\nmax-connections = -1\n")
    one.send(signal.SIGHUP)
    assert "max-connections: '-1' is not" in one.wait_line("nothing is reloaded: ")
    assert one.settled(2) == pids
    with greeted(one.service.port) as client:
        config.write_text("idle-timeout = 1\nbacklog = 3\n")
        one.send(signal.SIGHUP)
        one.wait_line("workers are replaced; changed: idle-timeout$")
        one.wait_line("a restart is needed for what changed of backlog$")
        one.wait_line(r"worker \d\] draining: ", count=2)
        assert echoes(client)  # it is its old worker's
    with greeted(one.service.port) as client:
        assert client.recv(1) == b""
    one.wait_line("worker .*, idle$")
    assert one.stop() == 0


def test_auto_is_one_worker_for_each_cpu_that_the_process_may_use(workers, service) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("this machine has one CPU")
    one = workers("--workers=auto", TCP)
    one.settled(len(cpus))
    alone = service("--workers=auto", TCP, launcher=["taskset", "-c", str(cpus[0])])
    assert children(alone.process.pid) == []
    with alone.connect() as client:
        assert is_greeted(client)


def test_workers_run_with_what_the_interpreter_was_told(service) -> None:
    one = service("--workers=2", TCP, launcher=[sys.executable, "-O", "-W", "error::SyntaxWarning", "-X", "utf8"])
    for pid in children(one.process.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert {b"-O", b"-Werror::SyntaxWarning"} <= {*command}
        assert command[command.index(b"-X") + 1] == b"utf8"


def test_connections_of_the_whole_service_are_divided_among_its_workers(workers, wait_for) -> None:
    one = workers("--max-connections=7", "--at-limit=reject", TCP)
    port = one.service.port

    def fill(most: int) -> list[socket.socket]:
        """Those clients of very many that are served."""
        served: list[socket.socket] = []
        for _ in range(100):
            client = connect(port)
            with contextlib.suppress(ConnectionResetError):
                if is_greeted(client):
                    served.append(client)
                    continue
            client.close()
        assert len(served) == most
        return served

    served = fill(7)
    shares = sorted(len(accepted_by(pid, served)) for pid in one.settled(2))
    assert shares == [3, 4]
    one.wait_line(r"worker \d\] refused 127\.0\.0\.1:\d+ on tcp:.*: --max-connections are open")
    for client in served:
        client.close()
    wait_for(lambda: len(one.lines("bytes in")) == 7)
    one.send(signal.SIGTTIN)
    one.wait_line(r"worker 2 \(pid \d+\) is ready")
    served = fill(7)
    assert sorted(len(accepted_by(pid, served)) for pid in one.settled(3)) == [2, 2, 3]
    for client in served:
        client.close()


# --- the log, and the service manager ---


def test_records_of_workers_are_in_the_log_with_their_slot_level_namespace_and_traceback(workers, site) -> None:
    one = workers(TCP, **site)
    os.kill(one.of_slot(1), FAIL)
    one.wait_line(r"\[some\.protocol#critical worker 1\] it failed for somebody$")
    one.wait_line(r"^\tbuiltins\.ZeroDivisionError: division by zero$")
    one.wait_line(r"\[some\.protocol#warn worker 1\] a warning with \['a', 1\]$")
    assert one.stop() == 0


def test_a_logger_of_the_users_gets_the_fields_of_what_workers_log(workers, site, tmp_path) -> None:
    (tmp_path / "site" / "mylogger.py").write_text(
        textwrap.dedent(
            """
            import json, sys
            from twisted.logger import ILogObserver, formatEvent
            from zope.interface import directlyProvides
            def observer():
                def emit(event):
                    fields = {k: v for k, v in event.items() if isinstance(v, (str, int, float))}
                    failure = event.get("log_failure")
                    fields["traceback"] = failure and failure.getTraceback()
                    fields["level"] = event["log_level"].name
                    print(json.dumps({**fields, "text": formatEvent(event)}), file=sys.__stdout__, flush=True)
                directlyProvides(emit, ILogObserver)
                return emit
            """
        )
    )
    one = workers("--listen=unix:s", twistd=("--logger=mylogger.observer",), **site)
    ready = json.loads(one.wait_line(r'"text": "worker 0 .* is ready'))
    os.kill(int(re.search(r"pid (\d+)", ready["worker"])[1]), FAIL)
    event = json.loads(one.wait_line("it failed for somebody"))
    assert (event["slot"], event["level"], event["log_namespace"]) == (0, "critical", "some.protocol")
    assert (event["peer"], event["answer"]) == ("somebody", 42)
    assert "in fails" in event["traceback"]
    assert event["traceback"].strip().endswith("builtins.ZeroDivisionError: division by zero")
    with greeted(f"{tmp_path}/s") as client:
        assert echoes(client)
    record = json.loads(one.wait_line("bytes_in"))
    assert (record["bytes_in"], record["bytes_out"], record["level"]) == (5, 27, "info")
    assert record["slot"] in (0, 1)


def test_the_last_words_of_a_worker_are_in_the_log(workers, site) -> None:
    one = workers(TCP, **site)
    os.kill(one.of_slot(0), DIE)
    one.wait_line(r"\[rtservice#error\] worker 0 \(pid \d+\) printed: these are\\x1b its last words$")
    one.wait_line(r"worker 0 \(pid \d+\) printed: unfinished")
    one.wait_line(r"worker 0 \(pid \d+\) has ended: .*signal 6")
    one.settled(2)
    assert one.stop() == 0


def test_a_flood_of_records_costs_records_and_nobody_service(workers, site) -> None:
    one = workers(TCP, **site)
    with Load(port=one.service.port, short=4, long=4) as load:
        os.kill(one.of_slot(0), FLOOD)
        one.wait_line(r"worker 0\] \d+ records were dropped: too many at once")
        load.more(50)
        assert_nobody_lost(load.stop())
    assert len(one.lines("a flood of")) < 50_000
    assert one.stop() == 0


def test_the_service_manager_hears_of_all_workers_at_once(workers, manager, wait_for) -> None:
    one = workers("--workers=3", TCP, NOTIFY_SOCKET=manager.path, WATCHDOG_USEC="500000")
    wait_for(lambda: manager.messages)

    def changes() -> list[str]:
        return [m for m in manager.messages if not m.startswith(("STATUS", "WATCHDOG", "EXTEND"))]

    clients = [greeted(one.service.port) for _ in range(5)]
    wait_for(lambda: "STATUS=serving: 3 of 3 workers ready, 5 connections open" in manager.messages)
    one.send(signal.SIGHUP)
    wait_for(lambda: len(changes()) == 3)
    seen = len(manager.messages)
    wait_for(lambda: manager.messages[seen:].count("WATCHDOG=1") >= 3)
    one.send(signal.SIGTERM)
    wait_for(lambda: len(changes()) == 4)
    wait_for(lambda: any(m.startswith("EXTEND_TIMEOUT_USEC=") for m in manager.messages))
    for client in clients:
        client.close()
    assert one.service.process.wait(DEADLINE) == 0
    first, reloading, again, stopping = changes()
    # A worker that has just started has not counted yet.
    assert re.fullmatch(r"READY=1\nSTATUS=serving: 3 of 3 workers ready, 0 connections open", first)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
    assert re.fullmatch(r"READY=1\nSTATUS=serving: 3 of 3 workers ready, [0-5] connections open", again)
    assert re.fullmatch(r"STOPPING=1\nSTATUS=draining: 3 of 3 workers ready, 5 connections open", stopping)
