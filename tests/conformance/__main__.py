"""Run Twisted's tests on our reactor and our transports beside Twisted's epoll reactor, and compare.

Exits 0 when everything that passes there passes here, or is in `EXCEPTIONS` with its reason.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

# Reactors, TCP, UNIX, UDP, TLS, endpoints, policies, processes, stdio, threads, timers and signals.
TESTS = [
    *(
        f"twisted.internet.test.test_{name}"
        for name in (
            "abstract address base baseprocess core default endpoints epollreactor fdset filedescriptor inlinecb main "
            "newtls pollingfile posixbase posixprocess process protocol reactormixins resolver serialport sigchld socket "
            "stdio tcp testing threads time tls udp udp_internals unix"
        ).split()
    ),
    *(
        f"twisted.test.test_{name}"
        for name in (
            "abstract amp application context cooperator defer fdesc ftp internet iosim log loopback pcp policies process "
            "protocols sni ssl sslverify stdio task tcp tcp_internals threadable threadpool threads udp unix"
        ).split()
    ),
    "twisted.protocols.test.test_basic",
    "twisted.protocols.test.test_tls",
]

# What the transports reach of it.
TRANSPORT_TESTS = [
    *(f"twisted.internet.test.test_{name}" for name in "core endpoints newtls socket tcp threads tls unix".split()),
    *(f"twisted.test.test_{name}" for name in "amp ftp internet loopback policies sni ssl sslverify tcp unix".split()),
    "twisted.protocols.test.test_tls",
]

# Tests that need not pass on ours, by how their names end, with the reason.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "rtservice": {},
    "transports": {},
}

# A run that shrinks below this compares nothing: an import that fails, say. About three quarters of what passes now.
LEAST_PASSED = {"rtservice": 1, "transports": 1}

RUN_SECONDS = 400


def run(reactor: str, tests: Sequence[str]) -> dict[str, str]:
    """The outcomes of one run; raises SystemExit when it gives none."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.suite", reactor, *tests],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=RUN_SECONDS)
            outcomes: dict[str, str] = json.loads(output)
        except (subprocess.TimeoutExpired, ValueError) as problem:
            said.seek(0)
            raise SystemExit(f"{said.read()[-5000:]}\nthe run on {reactor} gave no outcomes: {problem!r}") from None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        said.seek(0)
        report = said.read()
    if any(outcome == "failed" for outcome in outcomes.values()) and "-v" in sys.argv:
        print(report)
    return outcomes


def differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """The tests that pass there and not here."""
    return sorted(test for test, outcome in there.items() if outcome == "passed" and here.get(test) != "passed")


def counts(name: str, outcomes: dict[str, str]) -> str:
    counted = Counter(outcomes.values())
    return f"{name:12}" + ", ".join(f"{counted[kind]} {kind}" for kind in ("passed", "skipped", "todo", "failed"))


def compare(ours: str, tests: Sequence[str]) -> bool:
    """Run on Twisted's and on ours at once, print, and say whether ours is as good."""
    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(run, "epoll", tests)
        here = pool.submit(run, ours, tests).result()
        there = theirs.result()
    print(counts("epoll", there), counts(ours, here), sep="\n")
    different = []
    for test in differences(there, here):
        reason = next((why for end, why in EXCEPTIONS[ours].items() if test.endswith(end)), None)
        if reason is not None:
            print(f"excepted: {test}: {reason}")
            continue
        # Many of these tests race with the clock on a busy machine: what fails has to fail alone, too.
        name = test.replace("_Tests", _SUFFIX[ours])
        again = run(ours, [name])
        if again.get(test) == "passed":
            print(f"passed when run again: {test}")
        else:
            different.append(test)
            print(f"DIFFERENT: {test}: {here.get(test, 'missing')}, and {again.get(test, 'missing')} when run again")
    passed = sum(outcome == "passed" for outcome in here.values())
    if passed < LEAST_PASSED[ours]:
        print(f"only {passed} passed, of at least {LEAST_PASSED[ours]}")
        return False
    return not different


# How ReactorBuilder's test cases for a reactor end.
_SUFFIX = {"rtservice": "_ReactorTests", "transports": "_AdoptingReactorTests"}


def main() -> int:
    good = True
    for ours, tests in (("rtservice", TESTS), ("transports", TRANSPORT_TESTS)):
        print(f"== {ours} beside epoll", flush=True)
        good = compare(ours, tests) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
