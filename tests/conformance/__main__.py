"""`python tests/conformance`: Twisted's own tests on our reactor and transports, beside the same on Twisted's.

Whatever passes on Twisted's epoll reactor has to pass on ours. Needs the extra `conformance`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from differences import DIFFERENCES

HERE = Path(__file__).parent

# Everything of Twisted that tests a reactor, a transport, or something that stands directly on one.
MODULES = """
twisted.internet.test.test_abstract twisted.internet.test.test_address twisted.internet.test.test_base
twisted.internet.test.test_baseprocess twisted.internet.test.test_core twisted.internet.test.test_default
twisted.internet.test.test_endpoints twisted.internet.test.test_epollreactor twisted.internet.test.test_error
twisted.internet.test.test_fdset twisted.internet.test.test_filedescriptor twisted.internet.test.test_inotify
twisted.internet.test.test_main twisted.internet.test.test_newtls twisted.internet.test.test_pollingfile
twisted.internet.test.test_posixbase twisted.internet.test.test_posixprocess twisted.internet.test.test_process
twisted.internet.test.test_protocol twisted.internet.test.test_reactormixins twisted.internet.test.test_resolver
twisted.internet.test.test_sigchld twisted.internet.test.test_socket twisted.internet.test.test_stdio
twisted.internet.test.test_tcp twisted.internet.test.test_threads twisted.internet.test.test_time
twisted.internet.test.test_tls twisted.internet.test.test_udp twisted.internet.test.test_udp_internals
twisted.internet.test.test_unix
twisted.protocols.test.test_basic twisted.protocols.test.test_tls
twisted.test.test_abstract twisted.test.test_amp twisted.test.test_application twisted.test.test_cooperator
twisted.test.test_defer twisted.test.test_factories twisted.test.test_fdesc twisted.test.test_internet
twisted.test.test_iutils twisted.test.test_loopback twisted.test.test_pcp twisted.test.test_policies
twisted.test.test_process twisted.test.test_protocols twisted.test.test_shortcut twisted.test.test_sni
twisted.test.test_socks twisted.test.test_ssl twisted.test.test_sslverify twisted.test.test_stdio
twisted.test.test_strports twisted.test.test_task twisted.test.test_tcp twisted.test.test_tcp_internals
twisted.test.test_threadpool twisted.test.test_threads twisted.test.test_udp twisted.test.test_unix
""".split()


@dataclass(frozen=True)
class Subject:
    """What the tests run on: the name for --reactor, and the class for Twisted's ReactorBuilder."""

    title: str
    reactor: str
    class_name: str


EPOLL = Subject("Twisted's epoll reactor", "epoll", "twisted.internet.epollreactor.EPollReactor")
OURS = (
    Subject("our reactor", "rtservice", "rtservice.net.reactor.Reactor"),
    Subject("our reactor, Port and Connection", "adopting", "adopting.Reactor"),
)

# Fewer than this many passed means that something is not installed or not found, whatever the comparison says.
LEAST_PASSED = 1500

# Seconds for all tests on one reactor: several times what they take on an idle machine.
DEADLINE = 600


@dataclass
class Run:
    """One process with tests, and what became of them."""

    subject: Subject
    directory: Path
    tests: list[str]
    results: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir()
        command = [sys.executable, "-W", "ignore", str(HERE / "suite.py"), self.subject.reactor]
        command += [self.subject.class_name, str(self.directory / "results"), *self.tests]
        self._output = open(self.directory / "output", "w+")  # noqa: SIM115  # for as long as the process runs
        self._process = subprocess.Popen(
            command,
            cwd=self.directory,
            # What tests start and lose is found by its session, and its temporary files by this directory.
            env={**os.environ, "TMPDIR": str(self.directory)},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self, end: float) -> None:
        """Wait until `end`, a `time.monotonic`, leave no process behind, and read the results."""
        try:
            self._process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            print(f"{self.subject.title}: stopped at the deadline")
        self.kill()
        with open(self.directory / "results", "a+") as file:
            file.seek(0)
            for line in file:
                result = json.loads(line)
                self.results[result["test"]] = result
        if self._process.returncode:
            self._output.seek(0)
            print(f"{self.subject.title}: ended with {self._process.returncode}\n{self._output.read()[-4000:]}")
        self._output.close()

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def outcome(self, test: str) -> str:
        return self.results[test]["outcome"] if test in self.results else "missing"

    def summary(self) -> str:
        counts = Counter(result["outcome"] for result in self.results.values())
        total = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        return f"{self.subject.title}: {len(self.results)} tests: {total}"


def run_all(subjects: list[Subject], tests: list[str], where: Path, *, at_once: int) -> list[Run]:
    """The tests on each subject, several at once."""
    finished: list[Run] = []
    waiting, running = list(subjects), list[Run]()
    end = time.monotonic() + DEADLINE
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                subject = waiting.pop(0)
                running.append(Run(subject, where / f"{subject.reactor}-{time.monotonic_ns()}", tests))
            done = running.pop(0)
            try:
                done.finish(end)
            except BaseException:
                done.kill()
                raise
            finished.append(done)
            end = time.monotonic() + DEADLINE
    finally:
        for run in running:
            run.kill()
    return finished


def worse(epoll: Run, ours: Run) -> list[str]:
    """The tests that pass there and not here."""
    return [test for test in epoll.results if epoll.outcome(test) == "passed" and ours.outcome(test) != "passed"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/conformance", description=__doc__)
    parser.add_argument("modules", nargs="*", default=MODULES, help="modules of Twisted's tests, instead of all")
    parser.add_argument("--verbose", "-v", action="store_true", help="show the traceback of each difference")
    options = parser.parse_args()
    everything = options.modules is MODULES
    began = time.monotonic()
    verdict = 0
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        epoll, *ours = run_all([EPOLL, *OURS], options.modules, where, at_once=os.cpu_count() or 1)
        for run in (epoll, *ours):
            print(run.summary())
            passed = sum(result["outcome"] == "passed" for result in run.results.values())
            if everything and passed < LEAST_PASSED:
                print(f"  too few: at least {LEAST_PASSED} have to pass")
                verdict = 1
        for run in ours:
            reasons = DIFFERENCES[run.subject.reactor]
            differing = worse(epoll, run)
            known = [test for test in differing if test in reasons]
            new = [test for test in differing if test not in reasons]
            print(f"{run.subject.title}: {len(known)} known differences, {len(new)} others")
            for test in known:
                print(f"  {test}: {reasons[test]}")
            for test in new:
                print(f"  DIFFERS {test}: {run.outcome(test)}")
                if options.verbose and test in run.results:
                    print(run.results[test]["detail"])
                verdict = 1
            for test in reasons if everything else ():
                if test not in differing:
                    print(f"  {test} is listed as a difference, and is none")
                    verdict = 1
    print(f"{time.monotonic() - began:.0f} seconds")
    return verdict


if __name__ == "__main__":
    sys.exit(main())
