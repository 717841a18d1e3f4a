"""Many concurrent clients, in a separate process."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from typing import Any

from tests.support.deadline import DEADLINE
from tests.support.programs import PROGRAMS


class Load:
    """The clients of load.py, started with these arguments for `Clients`. Use it in a `with` statement."""

    program = "load.py"

    def __init__(self, **arguments: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / self.program), json.dumps(arguments)],
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
        """Return the counts so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def more(self, connections: int) -> None:
        """Wait until so many more connections have completed successfully."""
        wanted = self.count()["ok"] + connections
        end = time.monotonic() + DEADLINE
        while (count := self.count())["ok"] < wanted:
            assert time.monotonic() < end, count
            threading.Event().wait(0.02)

    def stop(self) -> dict[str, Any]:
        """Finish every connection, and return the final counts."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self._answer()
        self._process.wait(DEADLINE)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def assert_no_client_lost(count: dict[str, Any]) -> None:
    assert {**count, "ok": 0, "p50": 0, "p99": 0, "longest": 0} == {
        **{"ok": 0, "refused": 0, "reset": 0, "cut": 0, "silent": 0, "lost": 0},
        **{"p50": 0, "p99": 0, "longest": 0, "problems": []},
    }
