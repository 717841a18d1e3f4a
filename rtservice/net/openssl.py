"""OpenSSL settings that Python's `ssl` does not offer, applied to the SSL_CTX of an `ssl.SSLContext`.

Since 2.7, CPython keeps the address of the SSL_CTX in the first field after the object header, and `_ssl` is linked to
the OpenSSL that it uses. So `SSL_CTX_ctrl` (SSL_CTX_ctrl(3)) can be called through ctypes. Only calls without callbacks
are made: they need no memory that is writable and executable, so MemoryDenyWriteExecute= of systemd.exec(5) permits
them.

The assumption about the layout is checked on two contexts before anything is written, by reading values that Python can
read too. If it does not hold (`_ssl` built into the interpreter, another implementation of Python, another OpenSSL than
the one `_ssl` reports), every function raises UnavailableError with the reason.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

# openssl/ssl.h. Later versions do not reuse these numbers.
_SET_SESS_CACHE_MODE = 44
_SET_MAX_CERT_LIST = 51
_SET_GROUPS_LIST = 92
_GET_MIN_PROTO_VERSION = 130
_GET_MAX_PROTO_VERSION = 131
_SESS_CACHE_OFF = 0


class UnavailableError(Exception):
    """The SSL_CTX is not accessible in this process. The text is the reason."""


def set_groups(context: ssl.SSLContext, groups: str) -> bool:
    """Limit key exchange to the groups of a list (SSL_CTX_set1_groups_list(3)).

    Returns whether OpenSSL accepts the list. Raises UnavailableError.
    """
    return _controls().call(context, _SET_GROUPS_LIST, 0, groups.encode("ascii"))


def set_max_certificate_bytes(context: ssl.SSLContext, size: int) -> None:
    """Limit the size of a peer's certificate chain, in bytes (SSL_CTX_set_max_cert_list(3)).

    Raises UnavailableError.
    """
    _controls().call(context, _SET_MAX_CERT_LIST, size)


def disable_session_cache(context: ssl.SSLContext) -> None:
    """Disable the session cache, so that TLS 1.2 resumes no session by ID (SSL_CTX_set_session_cache_mode(3)).

    Raises UnavailableError.
    """
    _controls().call(context, _SET_SESS_CACHE_MODE, _SESS_CACHE_OFF)


class _Controls:
    """Calls SSL_CTX_ctrl on contexts of this process. The constructor raises UnavailableError."""

    def __init__(self) -> None:
        if sys.implementation.name != "cpython":
            raise UnavailableError(f"Python is {sys.implementation.name}, not CPython")
        try:
            import ctypes  # optional: an interpreter may be built without it

            library = ctypes.CDLL(ssl._ssl.__file__)  # type: ignore[attr-defined]  # private, not typed
            control = library.SSL_CTX_ctrl
            version = library.OpenSSL_version_num
            self._clear_errors = library.ERR_clear_error
        except AttributeError as error:
            raise UnavailableError("_ssl is built into the interpreter, or hides OpenSSL's functions") from error
        except (ImportError, OSError, MemoryError) as error:
            raise UnavailableError(f"ctypes cannot be used: {error}") from error
        control.restype, control.argtypes = (
            ctypes.c_long,
            (
                ctypes.c_void_p,
                ctypes.c_int,
                ctypes.c_long,
                ctypes.c_char_p,
            ),
        )
        version.restype, version.argtypes = ctypes.c_ulong, ()
        self._clear_errors.restype, self._clear_errors.argtypes = None, ()
        if version() != ssl.OPENSSL_VERSION_NUMBER:
            raise UnavailableError("_ssl uses another OpenSSL than the one it is linked to")
        self._control: Any = control
        head = object.__basicsize__
        if ssl.SSLContext.__basicsize__ < head + ctypes.sizeof(ctypes.c_void_p):
            raise UnavailableError("an ssl.SSLContext has no field for an SSL_CTX")
        field: Callable[[int], Any] = ctypes.c_void_p.from_address
        self._address: Callable[[ssl.SSLContext], int | None] = lambda context: field(id(context) + head).value
        self._check()

    def _check(self) -> None:
        """Compare values that SSL_CTX_ctrl reads with those set through `ssl`. Raises UnavailableError."""
        versions = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        contexts = []
        for version in versions:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = context.maximum_version = version
            contexts.append(context)
        addresses = [self._address(context) for context in contexts]
        # Before anything is read at these addresses: they look like results of malloc, not like numbers or flags.
        if not all(address and address > 1 << 16 and address % 8 == 0 for address in addresses):
            raise UnavailableError("an ssl.SSLContext has another layout than expected")
        if len(set(addresses)) < len(addresses) or not all(map(_is_writable, addresses)):
            raise UnavailableError("an ssl.SSLContext has another layout than expected")
        for context, version in zip(contexts, versions, strict=True):
            for which in (_GET_MIN_PROTO_VERSION, _GET_MAX_PROTO_VERSION):
                if self._control(self._address(context), which, 0, None) != version:
                    raise UnavailableError("an ssl.SSLContext has another layout than expected")

    def call(self, context: ssl.SSLContext, command: int, number: int, text: bytes | None = None) -> bool:
        """Call SSL_CTX_ctrl, and return whether its result is not 0. Some commands return 0 on success."""
        try:
            return bool(self._control(self._address(context), command, number, text))
        finally:
            # Clears the error queue of this thread: `ssl` would report a leftover as an error of its next call.
            self._clear_errors()


def _is_writable(address: int | None) -> bool:
    """Return whether the memory at an address is readable and writable; True if that is unknown (no /proc)."""
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            for line in maps:
                span, rights = line.split(maxsplit=2)[:2]
                low, high = (int(end, 16) for end in span.split("-"))
                if address is not None and low <= address < high:
                    return rights.startswith("rw")
    except (OSError, ValueError):
        return True
    return False


@cache
def _outcome() -> _Controls | str:
    """Return the controls or the reason why there are none. The exception is not kept: its traceback keeps frames."""
    if os.name != "posix":
        return f"not known on {os.name}"
    try:
        return _Controls()
    except UnavailableError as error:
        return str(error)


def unavailable() -> str | None:
    """Return why the SSL_CTX is not accessible in this process; None if it is."""
    outcome = _outcome()
    return outcome if isinstance(outcome, str) else None


def _controls() -> _Controls:
    outcome = _outcome()
    if isinstance(outcome, str):
        raise UnavailableError(outcome)
    return outcome
