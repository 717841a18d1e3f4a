"""Why a connection to Redis could not be made, as text for the log."""

from __future__ import annotations

import os
import ssl

from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.error import ConnectError, ConnectionRefusedError, DNSLookupError, TimeoutError

from rtservice.escaping import escaped


class ConnectFailed(Exception):  # noqa: N818  # as resp.Refused
    """There is no usable connection, for the reason in the text."""


def reason_of(error: BaseException) -> str:
    """Return the reason of a failed connection, without the stack of exceptions that led to it."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, DNSLookupError):
        return "host name not found"
    if isinstance(error, TimeoutError | DeferredTimeout):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate rejected: {escaped(error.verify_message)}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {escaped(error.reason or str(error))}"
    if isinstance(error, ConnectError) and isinstance(error.osError, int):
        return os.strerror(error.osError)
    return escaped(str(error) or type(error).__name__)
