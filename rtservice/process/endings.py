"""The reason why a connection ended, as one of a few fixed texts."""

from __future__ import annotations

import errno
import ssl

from twisted.internet import error
from twisted.python.failure import Failure

from rtservice.net.connection import LocalClose
from rtservice.net.proxy import ProxyError


def end_reason(reason: Failure, *, peer_finished: bool, problem: Exception | None) -> str:
    """Return why a connection ended, for its log record and its counter.

    `reason` is the Failure that `connectionLost` gets. `peer_finished` is whether the peer had sent FIN. `problem` is
    the last error of the kernel or of TLS, a ProxyError, the LocalClose with which this side closed, or None. After a
    TLS failure, OpenSSL's name of it follows in parentheses. The text contains no bytes from the peer.
    """
    if isinstance(problem, LocalClose):
        return str(problem)
    if isinstance(problem, ProxyError):
        return "invalid PROXY header"
    if isinstance(problem, ssl.SSLEOFError):
        return "peer finished without close_notify"
    if isinstance(problem, ssl.SSLError):
        # For example HTTP_REQUEST, NO_SHARED_CIPHER or BAD_RECORD_MAC.
        return f"TLS failed ({problem.reason or type(problem).__name__})"
    if isinstance(problem, OSError):
        if problem.errno in (errno.ECONNRESET, errno.EPIPE):
            return "reset by peer"
        return "timed out" if problem.errno == errno.ETIMEDOUT else "lost"
    if isinstance(reason.value, error.ConnectionAborted):
        return "aborted"
    if isinstance(reason.value, error.ConnectionDone):
        return "peer finished" if peer_finished else "closed"
    return "lost" if isinstance(reason.value, error.ConnectionLost) else "failed"
