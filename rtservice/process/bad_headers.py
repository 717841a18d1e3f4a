"""The rate-limited log of invalid PROXY headers."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from rtservice.events import PROXY_HEADER_INVALID, PROXY_HEADERS_SUPPRESSED
from rtservice.log_rate import LogRateLimit
from rtservice.net.address import peer_name
from rtservice.net.proxy import ProxyError

# Headers of one listener that are logged in a period, and the length of a period in seconds.
_MOST, _PERIOD = 5, 10.0


class BadHeaderLog:
    """Logs what a misconfigured proxy, or a client without a proxy, has sent instead of a PROXY header.

    For each listener it logs the first few in a period, and at the end of the period how many more there were.
    """

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._clock: IReactorTime | None = None
        self._rates: dict[str, LogRateLimit] = {}  # by listener
        self._summaries: dict[str, IDelayedCall] = {}  # by listener

    def start(self, clock: IReactorTime) -> None:
        """Start to schedule summaries with this clock."""
        self._clock = clock

    def stop(self) -> None:
        """Log the pending summaries now."""
        self._clock = None
        for listener, summary in list(self._summaries.items()):
            summary.cancel()
            self._sum_up(listener)

    def add(self, peer: Any, listener: str, problem: ProxyError, now: float) -> None:
        """Log the header of a connection from `peer` (its address), or count it for the summary; `now` in seconds."""
        rate = self._rates.get(listener)
        if rate is None:
            rate = self._rates[listener] = LogRateLimit(_MOST, _PERIOD)
        if rate.may_log(now):
            PROXY_HEADER_INVALID.log(
                self._log,
                peer=peer_name(peer),
                listener=listener,
                problem=str(problem),
                beginning=repr(problem.beginning)[1:],
            )
        elif listener not in self._summaries and self._clock is not None:
            self._summaries[listener] = self._clock.callLater(_PERIOD, self._sum_up, listener)

    def _sum_up(self, listener: str) -> None:
        self._summaries.pop(listener, None)
        PROXY_HEADERS_SUPPRESSED.log(self._log, listener=listener, count=self._rates[listener].take_suppressed())
