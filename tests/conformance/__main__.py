"""Run Twisted's tests on our reactor and transports and on Twisted's epoll reactor, and compare the outcomes.

Exits 0 when each test that passes on Twisted's passes on ours, or is in `EXCEPTIONS` with its reason.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def _tests(package: str, names: str) -> list[str]:
    return [f"{package}.test_{name}" for name in names.split()]


# Reactors, TCP, UNIX, UDP, TLS, endpoints, policies, processes, stdio, threads, timers and signals.
TESTS = (
    _tests(
        "twisted.internet.test",
        "abstract address base baseprocess core default endpoints epollreactor fdset filedescriptor inlinecb main "
        "newtls pollingfile posixbase posixprocess process protocol reactormixins resolver serialport sigchld socket "
        "stdio tcp testing threads time tls udp udp_internals unix",
    )
    + _tests(
        "twisted.test",
        "abstract amp application context cooperator defer fdesc ftp internet iosim log loopback pcp policies process "
        "protocols sni ssl sslverify stdio task tcp tcp_internals threadable threadpool threads udp unix",
    )
    + _tests("twisted.protocols.test", "basic tls")
)

# The tests that use transports.
TRANSPORT_TESTS = (
    _tests("twisted.internet.test", "core endpoints newtls socket tcp threads tls unix")
    + _tests("twisted.test", "amp ftp internet loopback policies sni ssl sslverify tcp unix")
    + _tests("twisted.protocols.test", "tls")
)

_NO_DESCRIPTOR = "without a free descriptor Twisted closes new connections; ours leaves them in the backlog"
_REPR = "it reads attributes and texts of Twisted's own class: sessionno, logstr, repr()"
_DESCRIPTORS = "passing descriptors over UNIX sockets (IUNIXTransport) is not offered"

# Tests that need not pass on ours, and why.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "rtservice": {},
    "transports": {
        "test_closePeerOnEMFILE": _NO_DESCRIPTOR,
        "test_serverAddressTCP4": _REPR,
        "test_serverAddressTCP6": _REPR,
        "test_serverRepr": _REPR,
        "test_avoidLeakingFileDescriptors": _DESCRIPTORS,
        "test_descriptorDeliveredBeforeBytes": _DESCRIPTORS,
        "test_fileDescriptorOverrun": _DESCRIPTORS,
        "test_sendFileDescriptor": _DESCRIPTORS,
        "test_sendFileDescriptorTriggersPauseProducing": _DESCRIPTORS,
    },
}

# A run with fewer passed tests is invalid, such as one with a failed import: about 75% of the present number.
LEAST_PASSED = {"rtservice": 1700, "transports": 900}

RUN_SECONDS = 400


def run(reactor: str, tests: Sequence[str]) -> dict[str, str]:
    """Return the outcomes of one run; raise SystemExit when it returns none."""
    with tempfile.TemporaryFile("w+") as error_output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.suite", reactor, *tests],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=error_output,
            env={**os.environ, "PYTHONPATH": os.getcwd()},  # for child processes of tests
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=RUN_SECONDS)
            outcomes: dict[str, str] = json.loads(output)
        except (subprocess.TimeoutExpired, ValueError) as problem:
            error_output.seek(0)
            raise SystemExit(
                f"{error_output.read()[-5000:]}\nthe run on {reactor} gave no outcomes: {problem!r}"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        error_output.seek(0)
        report = error_output.read()
    if any(outcome == "failed" for outcome in outcomes.values()) and "-v" in sys.argv:
        print(report)
    return outcomes


def differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """Return the tests that pass in the first outcomes and not in the second."""
    return sorted(test for test, outcome in there.items() if outcome == "passed" and here.get(test) != "passed")


def counts(name: str, outcomes: dict[str, str]) -> str:
    counted = Counter(outcomes.values())
    return f"{name:12}" + ", ".join(f"{counted[kind]} {kind}" for kind in ("passed", "skipped", "todo", "failed"))


def compare(ours: str, tests: Sequence[str]) -> bool:
    """Run on Twisted's reactor and on ours concurrently, and print; return whether ours passes the same tests."""
    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(run, "epoll", tests)
        here = pool.submit(run, ours, tests).result()
        there = theirs.result()
    print(counts("epoll", there), counts(ours, here), sep="\n")
    different = []
    for test in differences(there, here):
        reason = next((why for end, why in EXCEPTIONS[ours].items() if test.endswith(f".{end}")), None)
        if reason is not None:
            print(f"excepted: {test}: {reason}")
            continue
        # Many of these tests depend on timing on a busy machine: a failed test is repeated alone.
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


# The suffix of ReactorBuilder's test cases for each reactor.
_SUFFIX = {"rtservice": "_ReactorTests", "transports": "_AdoptingReactorTests"}


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # run() kills its process group on exit
    passed_all = True
    for ours, tests in (("rtservice", TESTS), ("transports", TRANSPORT_TESTS)):
        print(f"== {ours} beside epoll", flush=True)
        passed_all = compare(ours, tests) and passed_all
    return 0 if passed_all else 1


if __name__ == "__main__":
    sys.exit(main())
