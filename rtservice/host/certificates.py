"""The certificates that listeners show: what is said of them, and how they are renewed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from twisted.logger import Logger

from rtservice.net.crl import RevocationLists
from rtservice.net.listeners import Listener
from rtservice.net.stream import Port, escaped

# Of one certificate, in its line of the log; and of a directory of them.
_NAMES_SHOWN = 5
_CERTIFICATES_SHOWN = 100


def _some_of(names: tuple[str, ...]) -> str:
    """The first of a certificate's names, which can be thousands."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def log_certificates(log: Logger, listeners: list[Listener]) -> None:
    """Log when each certificate that is shown, and each revocation list, expires, and warnings of TLS."""
    now = time.time()
    for warning in dict.fromkeys(warning for listener in listeners for warning in listener.warnings):
        log.warn("{warning}", warning=warning)
    for lists in dict.fromkeys(listener.revocation for listener in listeners if listener.revocation is not None):
        _log_revocation(log, lists, now)
    # Two listeners may show the same one.
    for certificate in dict.fromkeys(one for listener in listeners for one in listener.certificates):
        seconds = certificate.not_after - now
        state = f"expires in {seconds / 86400:.0f} days" if seconds >= 0 else "has expired"
        if certificate.not_before > now:
            state = "is not valid yet"
        (log.info if seconds >= 0 and certificate.not_before <= now else log.warn)(
            "certificate {path} for {names}: {state}",
            path=certificate.path,
            names=escaped(_some_of(certificate.names)) or "no name",
            state=state,
            not_after=certificate.not_after,
        )


def _log_revocation(log: Logger, lists: RevocationLists, now: float) -> None:
    if lists.next_update is None:
        state, write = "has no next update", log.info
    elif lists.next_update >= now:
        state, write = f"next update in {(lists.next_update - now) / 86400:.0f} days", log.info
    else:
        state, write = "next update has passed: clients of its authority are refused", log.warn
    write("revocation list {path}: {state}", path=lists.path, state=state, next_update=lists.next_update)


def certificates_of(listeners: list[Listener]) -> list[dict[str, Any]]:
    """The certificates that listeners show, as plain data: of many, those that end first."""
    shown: list[dict[str, Any]] = [
        {
            "listener": listener.name,
            "path": escaped(certificate.path),
            "names": escaped(_some_of(certificate.names)),
            "not_after": certificate.not_after,
        }
        for listener in listeners
        for certificate in listener.certificates
    ]
    return sorted(shown, key=lambda one: one["not_after"])[:_CERTIFICATES_SHOWN]


def renewed(served: Iterable[tuple[Listener, Port | None]]) -> Callable[[], None]:
    """Read and check the certificates of listeners again; gives what puts them in force, for new connections.

    With each listener is the port that accepts on it, if that is in this process. Raises ListenError, and nothing has
    changed.
    """
    read = [(listener, port, listener.renew()) for listener, port in served]

    def adopt() -> None:
        for listener, port, loaded in read:
            if loaded is not None:
                listener.adopt(loaded)
                if port is not None:
                    port.tls = listener.tls

    return adopt
