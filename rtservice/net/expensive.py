"""Handshakes that a client can make expensive, in a thread: one at a time, so that the reactor and others go on.

OpenSSL decodes the public key of each certificate that a client shows before it verifies any of them. 12 KiB of
certificates with compressed points of P-224 take 90 ms, and a limit low enough for a few milliseconds would refuse
chains of honest clients. OpenSSL runs without Python's global lock, so another thread is enough.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import DeferredLock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from rtservice.net.tls_bounds import MAX_INLINE_CERTIFICATES

_log = Logger()

# More at a time would take the processor from the reactor.
_turn = DeferredLock()


def may_be_expensive(connection: ssl.SSLObject, size: int) -> bool:
    """Whether OpenSSL may take long for this many bytes, which have come since the server's part of the handshake."""
    return size > MAX_INLINE_CERTIFICATES and connection.context.verify_mode != ssl.CERT_NONE


def shake_in_thread(
    reactor: Any,
    connection: ssl.SSLObject,
    is_wanted: Callable[[], bool],
    done: Callable[[ssl.SSLError | None], None],
) -> None:
    """Call the connection's do_handshake in a thread of the reactor's, then `done` in the reactor with what it raised.

    Nothing else may use the connection meanwhile. If it is not wanted any more when its turn comes, nothing is called.
    """

    def shake() -> ssl.SSLError | None:
        # Returned, not raised: the Failure that a thread of the pool makes is in a cycle with its frame, which would
        # keep the connection until a garbage collection.
        try:
            connection.do_handshake()
        except ssl.SSLError as problem:
            return problem.with_traceback(None)
        return None

    def begin() -> Any:
        if is_wanted():
            return deferToThreadPool(reactor, reactor.getThreadPool(), shake).addCallback(done)
        return None

    _turn.run(begin).addErrback(lambda reason: _log.failure("a handshake in a thread failed", reason))
