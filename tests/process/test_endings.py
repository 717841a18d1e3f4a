"""The reason of the end of a connection."""

import errno

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.python.failure import Failure

from rtservice.process.endings import end_reason


@pytest.mark.parametrize(
    ("error", "peer_finished", "code", "reason"),
    [
        (ConnectionDone(), True, None, "peer finished"),
        (ConnectionDone(), False, None, "closed"),
        (ConnectionAborted(), False, None, "aborted"),
        (ConnectionLost(), False, errno.ECONNRESET, "reset by peer"),
        (ConnectionLost(), True, errno.EPIPE, "reset by peer"),
        (ConnectionLost(), False, errno.ETIMEDOUT, "timed out"),
        (ConnectionLost(), False, errno.EHOSTUNREACH, "lost"),
        (ConnectionLost(), False, None, "lost"),
        (ZeroDivisionError(), False, None, "failed"),
    ],
)
def test_each_connection_end_has_one_of_a_fixed_set_of_reasons(error, peer_finished, code, reason) -> None:
    problem = None if code is None else OSError(code, "of the test")
    assert end_reason(Failure(error), peer_finished=peer_finished, problem=problem) == reason
