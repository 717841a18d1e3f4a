"""Ask workers for their open connections, and collect the answers until a deadline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.defer import Deferred

from rtservice.pool.worker_process import WorkerPhase, WorkerProcess
from rtservice.process.backend import ConnectionRows
from rtservice.process.registry import first_rows

# Seconds until workers must have answered.
_ANSWER = 2.0


class PendingQuery:
    """A question to workers, and the answers so far."""

    def __init__(self) -> None:
        self.waiting: list[WorkerProcess] = []
        self.missing: list[WorkerProcess] = []  # workers that cannot answer
        self.rows: list[list[Any]] = []
        self.answer: Deferred[ConnectionRows] = Deferred()
        self.deadline: Any = None


class Queries:
    """The questions that are not yet answered."""

    def __init__(self) -> None:
        self._pending: dict[int, PendingQuery] = {}
        self._asked = 0

    def ask(self, reactor: Any, workers: Iterable[WorkerProcess], sort: str, count: int) -> Deferred[ConnectionRows]:
        """Ask these workers for connections. Fires with the first `count` of all in the order of `sort`.

        A worker that is still starting has no connections, and is not asked. A worker without recent heartbeats is not
        asked either, and counts as missing.
        """
        self._asked += 1
        number = self._asked
        query = self._pending[number] = PendingQuery()
        query.answer.addCallback(lambda found: (first_rows(found[0], sort, count), found[1]))
        query.deadline = reactor.callLater(_ANSWER, self._resolve, number)
        now = reactor.seconds()
        for worker in workers:
            if worker.phase is not WorkerPhase.STARTING:
                asked = not worker.is_silent(now) and worker.ask(number, sort, count)
                (query.waiting if asked else query.missing).append(worker)
        answer = query.answer
        if not query.waiting:
            self._resolve(number)
        return answer

    def answered(self, worker: WorkerProcess, number: int, rows: list[list[Any]]) -> None:
        """Add the answer of a worker. An answer after the deadline is ignored."""
        query = self._pending.get(number)
        if query is not None and worker in query.waiting:
            query.waiting.remove(worker)
            query.rows += [[worker.slot, *row] for row in rows]
            if not query.waiting:
                self._resolve(number)

    def worker_gone(self, worker: WorkerProcess) -> None:
        """Stop waiting for this worker: its process has ended, and so have its connections."""
        for number in list(self._pending):
            self.answered(worker, number, [])

    def close(self) -> None:
        """Resolve each question with the answers so far."""
        for number in list(self._pending):
            self._resolve(number)

    def _resolve(self, number: int) -> None:
        query = self._pending.pop(number)
        if query.deadline.active():
            query.deadline.cancel()
        missing = [worker.slot for worker in (*query.waiting, *query.missing)]
        query.answer.callback((query.rows, missing))
