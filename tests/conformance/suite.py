"""Twisted's own tests on one reactor, in this process: `suite.py REACTOR-NAME REACTOR-CLASS RESULTS TEST...`

The reactor becomes the process's, under which trial runs every test, and the only one for which Twisted's ReactorBuilder
makes its test classes. One line of JSON for each test as it ends: its name, the outcome and what is known about that.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from twisted.application.reactors import installReactor
from twisted.python.reflect import namedAny

# `installReactor` knows the names that trial's and twistd's --reactor take.
reactor_name, reactor_class, results, *tests = sys.argv[1:]
if reactor_class.startswith("adopting."):
    namedAny("adopting.install")()
else:
    installReactor(reactor_name)

# Only now: importing these imports the reactor.
from twisted.internet import reactor  # noqa: E402
from twisted.internet.test.reactormixins import ReactorBuilder  # noqa: E402
from twisted.trial.reporter import Reporter  # noqa: E402
from twisted.trial.runner import TestLoader, TrialRunner  # noqa: E402

ReactorBuilder._reactors = [reactor_class]
# Test classes are named after their reactor; without that the same test has the same name in every run.
SUFFIX = f"_{reactor_class.rpartition('.')[2]}Tests"


class Recorder(Reporter):
    """Writes what became of each test; the worst counts where there are several reports of one."""

    file: TextIO

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self._outcome, self._detail = "passed", ""
        self._write(test, "started")

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        self._write(test, self._outcome)

    def _write(self, test: Any, outcome: str) -> None:
        name = test.id().replace(SUFFIX, "_Tests")
        seconds = round(self._lastTime or 0, 3)
        record = {"test": name, "id": test.id(), "outcome": outcome, "detail": self._detail, "seconds": seconds}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def _note(self, outcome: str, detail: Any) -> None:
        if self._outcome in ("passed", "skipped"):
            self._outcome, self._detail = outcome, detail if isinstance(detail, str) else detail.getTraceback()

    def addFailure(self, test: Any, fail: Any) -> None:
        super().addFailure(test, fail)
        self._note("failed", self._getFailure(fail))

    def addError(self, test: Any, error: Any) -> None:
        super().addError(test, error)
        self._note("failed", self._getFailure(error))

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self._note("skipped", str(reason))

    def addExpectedFailure(self, test: Any, failure: Any, todo: Any = None) -> None:
        super().addExpectedFailure(test, failure, todo)
        self._note("todo", "")

    def addUnexpectedSuccess(self, test: Any, todo: Any = None) -> None:
        super().addUnexpectedSuccess(test, todo)
        self._note("passed", "")


assert isinstance(reactor, namedAny(reactor_class)), f"{reactor} runs, not {reactor_class}"
with open(results, "w") as Recorder.file, tempfile.TemporaryDirectory() as directory:
    with open(Path(directory) / "report", "w") as report:
        runner = TrialRunner(Recorder, stream=report, workingDirectory=str(Path(directory) / "trial"))
        runner.run(TestLoader().loadByNames(tests))
