"""One run of Twisted's tests on one reactor: `python -m tests.conformance.suite REACTOR TEST...`.

The reactor is installed as `trial --reactor` does it, and is also the only one that Twisted's `ReactorBuilder` makes
its test cases for. The outcome of each test goes to standard output as JSON; the output of tests, and the tracebacks of
failed ones, go to standard error.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from twisted.application.reactors import installReactor
from twisted.python.reflect import namedAny

# The name for `--reactor`, and the class for ReactorBuilder.
REACTORS = {
    "epoll": ("epoll", "twisted.internet.epollreactor.EPollReactor"),
    "rtservice": ("rtservice", "rtservice.net.reactor.Reactor"),
    "transports": ("rtservice", "tests.conformance.transports.AdoptingReactor"),
}

# ReactorBuilder puts the name of the reactor's class into that of each test case.
_REACTOR_NAME = re.compile(r"_(EPollReactor|AdoptingReactor|Reactor)Tests\b")

# Seconds. The tests take milliseconds; Twisted's default of two minutes would add up when many fail.
_TIMEOUT = 10.0


def run(reactor: str, tests: Sequence[str]) -> dict[str, str]:
    """Return the outcome of each test by its name: passed, failed, skipped or todo."""
    name, builder = REACTORS[reactor]
    installed: Any = installReactor(name)
    # Imported after the reactor is installed, because these modules import it.
    from twisted.internet.test import reactormixins
    from twisted.trial import util
    from twisted.trial.reporter import Reporter
    from twisted.trial.runner import TestLoader, TrialRunner

    if reactor == "transports":
        from tests.conformance.transports import AdoptingReactor

        installed.__class__ = AdoptingReactor
    reactormixins.ReactorBuilder._reactors = [builder]
    # Some tests skip by this class name because of limits of epoll(7).
    namedAny(builder).__name__ = "EPollReactor"
    reactormixins.DEFAULT_TIMEOUT_DURATION = util.DEFAULT_TIMEOUT_DURATION = _TIMEOUT
    outcomes: dict[str, str] = {}

    class Recorder(Reporter):
        def _record(self, test: Any, outcome: str) -> None:
            key = _REACTOR_NAME.sub("_Tests", test.id())
            # A failure in the clean-up is reported after the test itself, and takes precedence.
            if outcomes.get(key) != "failed":
                outcomes[key] = outcome

        def addSuccess(self, test: Any) -> None:
            self._record(test, "passed")

        def addSkip(self, test: Any, reason: Any) -> None:
            self._record(test, "skipped")

        def addExpectedFailure(self, test: Any, failure: Any, todo: Any = None) -> None:
            self._record(test, "todo")

        def addUnexpectedSuccess(self, test: Any, todo: Any = None) -> None:
            self._record(test, "todo")

        def addError(self, test: Any, error: Any) -> None:
            self._record(test, "failed")
            text = error.getTraceback() if hasattr(error, "getTraceback") else repr(error)
            print(f"=== {test.id()}\n{text}", file=sys.stderr)

        addFailure = addError

    with tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as nowhere:
        runner = TrialRunner(Recorder, stream=nowhere, workingDirectory=os.path.join(directory, "trial"))
        runner.run(TestLoader().loadByNames(list(tests), recurse=True))
    return outcomes


if __name__ == "__main__":
    # Tests and their child processes write to standard output: the outcomes get a separate descriptor.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        json.dump(run(sys.argv[1], sys.argv[2:]), answer)
