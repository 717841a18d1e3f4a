"""The certificates of listeners: log their expiry, describe them for the status page, and reload them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from heapq import nsmallest
from typing import Any

from twisted.logger import Logger

from rtservice.counted import counted
from rtservice.escaping import escaped
from rtservice.events import (
    CERTIFICATE_EXPIRED,
    CERTIFICATE_LOADED,
    CERTIFICATE_NOT_YET_VALID,
    REVOCATION_EXPIRED,
    REVOCATION_LOADED,
    REVOCATION_UNDATED,
    TLS_GROUPS_LIMITED,
)
from rtservice.net.crl import RevocationLists
from rtservice.net.description import ListenError
from rtservice.net.listener import Listener
from rtservice.net.port import Port
from rtservice.net.tls import Certificate, CertificateContext, Files, LoadedTLS, fingerprinting
from rtservice.steps import Steps

# Limits of a log line about a certificate: names, and characters of a name (255 bytes in RFC 1035, section 2.3.4).
_NAMES_SHOWN, _LONGEST_NAME = 5, 255
# Certificates on the status page.
_CERTIFICATES_SHOWN = 100

# Attempts to read files that change while they are read, and so do not match each other.
_READINGS = 3

_DAY = 86400


def days_left(until: float, now: float) -> int:
    """Return the whole days from `now` until a time, both in seconds since 1970; negative if it has passed.

    The log, the status page and its JSON show this number.
    """
    return int((until - now) // _DAY)


def _in_words(days: int) -> str:
    return counted(days, "day") if days else "less than 1 day"


def _some_of(names: tuple[str, ...]) -> str:
    """Return the first names of a certificate for display. A certificate can have thousands."""
    more = len(names) - _NAMES_SHOWN
    shown = ", ".join(
        name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…" for name in names[:_NAMES_SHOWN]
    )
    return escaped(shown) + (f" and {more} more" if more > 0 else "")


def logging_certificates(log: Logger, listeners: list[Listener]) -> Steps[None]:
    """Log the expiry of each certificate and revocation list, and TLS warnings, in steps."""
    for warning in dict.fromkeys(warning for listener in listeners for warning in listener.warnings):
        TLS_GROUPS_LIMITED.log(log, warning=warning)
    for lists in dict.fromkeys(listener.revocation for listener in listeners if listener.revocation is not None):
        _log_revocation(log, lists, time.time())
    # Two listeners may have the same certificate.
    for certificate in dict.fromkeys(found for listener in listeners for found in listener.certificates):
        _log_certificate(log, certificate, time.time())
        yield


def _log_certificate(log: Logger, certificate: Certificate, now: float) -> None:
    path, names = escaped(certificate.path), _some_of(certificate.names) or "no name"
    until, days = certificate.not_after, days_left(certificate.not_after, now)
    if certificate.not_before > now:
        CERTIFICATE_NOT_YET_VALID.log(log, path=path, names=names, not_after=until, days_left=days)
    elif days < 0:
        CERTIFICATE_EXPIRED.log(log, path=path, names=names, not_after=until, days_left=days)
    else:
        CERTIFICATE_LOADED.log(log, path=path, names=names, left=_in_words(days), not_after=until, days_left=days)


def _log_revocation(log: Logger, lists: RevocationLists, now: float) -> None:
    path, until = escaped(lists.path), lists.next_update
    if until is None:
        REVOCATION_UNDATED.log(log, path=path, next_update=until)
    elif until >= now:
        REVOCATION_LOADED.log(log, path=path, left=_in_words(days_left(until, now)), next_update=until)
    else:
        REVOCATION_EXPIRED.log(log, path=path, next_update=until)


def certificates_of(listeners: list[Listener], now: float | None = None) -> list[dict[str, Any]]:
    """Return the certificates of listeners as plain data.

    If there are more than `_CERTIFICATES_SHOWN`: those that expire first, and the first to expire of each listener.
    """
    now = time.time() if now is None else now
    by_expiry = [
        (certificate.not_after, number, certificate)
        for number, listener in enumerate(listeners)
        for certificate in listener.certificates
    ]
    # Selected before texts are escaped: thousands of texts would block the reactor for too long.
    chosen = nsmallest(_CERTIFICATES_SHOWN, by_expiry, key=lambda entry: entry[:2])
    present = {number for _, number, _ in chosen}
    for number, listener in enumerate(listeners):
        if listener.certificates and number not in present:
            first = min(listener.certificates, key=lambda certificate: certificate.not_after)
            chosen.append((first.not_after, number, first))
    return [
        {
            "listener": listeners[number].name,
            "path": escaped(certificate.path),
            "names": _some_of(certificate.names),
            "not_before": certificate.not_before,
            "not_after": not_after,
            "days_left": days_left(not_after, now),
        }
        for not_after, number, certificate in chosen
    ]


def renewing(
    served: Iterable[tuple[Listener, Port | None]], read: dict[object, Files] | None = None
) -> Steps[Callable[[], Steps[None]]]:
    """Read and check the certificates of listeners again, in steps. Returns a function that applies them.

    The function applies all certificates at once, for new connections, and returns more steps, which free the old
    contexts: 0.1 ms for each renewed certificate.

    `served` pairs each listener with the port that accepts on it, or None if that is in another process. If `read` is
    given, the files that were read are added to it, by the source of the listener: a worker may have no permission to
    read them. Raises ListenError, after which nothing has changed. Files that do not match each other are read again if
    they have changed meanwhile, since a renewal may be in progress.
    """
    pairs = list(served)
    for reading in range(_READINGS):
        before = yield from _fingerprints(pairs)
        try:
            loaded: dict[object, LoadedTLS | None] = {}  # by source, which the listeners of one description share
            for listener, _ in pairs:
                if listener.source not in loaded:
                    files = Files()
                    loaded[listener.source] = yield from listener.renewing(files)
                    if read is not None:
                        read[listener.source] = files
            break
        except ListenError:
            if reading == _READINGS - 1 or before == (yield from _fingerprints(pairs)):
                raise

    def use_certificates() -> Steps[None]:
        before = [made for listener, _ in pairs for made in listener.reusable.made.values()]
        for listener, port in pairs:
            renewed = loaded[listener.source]
            if renewed is not None:
                listener.adopt(renewed)
                if port is not None:
                    port.tls = listener.tls
        return free(before)

    def free(before: list[CertificateContext]) -> Steps[None]:
        while before:
            before.pop()
            yield

    return use_certificates


def _fingerprints(served: list[tuple[Listener, Port | None]]) -> Steps[object]:
    return (yield from fingerprinting([file for listener, _ in served for file in listener.tls_files()]))
