"""Run expensive handshakes (those with client certificates) in a thread, one at a time.

OpenSSL decodes the public key of each certificate of a client before it verifies any of them. 12 KiB of certificates
with compressed points on P-224 take 90 ms, and a limit that keeps this to a few milliseconds would reject valid chains.
OpenSSL runs without Python's global lock, so a thread keeps the reactor free.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import DeferredLock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from rtservice.events import TLS_THREAD_FAILED
from rtservice.net.tls_bounds import MAX_INLINE_CERTIFICATES

_log = Logger()

# One handshake at a time: several would take CPU time from the reactor.
_turn = DeferredLock()


def may_be_expensive(connection: ssl.SSLObject, size: int) -> bool:
    """Return whether OpenSSL may need long for `size` bytes, received since the server's handshake messages."""
    return size > MAX_INLINE_CERTIFICATES and connection.context.verify_mode != ssl.CERT_NONE


def shake_in_thread(
    reactor: Any,
    connection: ssl.SSLObject,
    is_wanted: Callable[[], bool],
    done: Callable[[ssl.SSLError | None], None],
) -> None:
    """Call do_handshake of the connection in a reactor thread, then `done` in the reactor with its exception or None.

    Nothing else may use the connection meanwhile. If `is_wanted` returns False when its turn comes, neither is called.
    """

    def shake() -> ssl.SSLError | None:
        # Returned, not raised: the thread pool's Failure forms a cycle with its frame, which would keep the connection
        # in memory until a garbage collection.
        try:
            connection.do_handshake()
        except ssl.SSLError as problem:
            return problem.with_traceback(None)
        return None

    def begin() -> Any:
        if is_wanted():
            return deferToThreadPool(reactor, reactor.getThreadPool(), shake).addCallback(done)
        return None

    _turn.run(begin).addErrback(lambda reason: TLS_THREAD_FAILED.failure(_log, reason))
