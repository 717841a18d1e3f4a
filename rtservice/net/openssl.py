"""Settings of OpenSSL that Python's `ssl` does not offer, made on the SSL_CTX below an `ssl.SSLContext`.

CPython keeps the address of the SSL_CTX in the first field after the head of the object, since 2.7, and `_ssl` is
linked to the OpenSSL that it uses. So `SSL_CTX_ctrl` (SSL_CTX_ctrl(3)) can be called through ctypes. Only calls without
callbacks are made: they need no memory that is writable and executable, so that MemoryDenyWriteExecute= of
systemd.exec(5) permits them.

Nothing is written before the assumption about the layout has been checked on two contexts, by reading values that
Python can read too. Where it does not hold (`_ssl` built into the interpreter, another implementation of Python,
another OpenSSL than the one `_ssl` reports), nothing is available, and each function says so.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

# openssl/ssl.h. A ctrl number is never used for anything else in a later version.
_SET_SESS_CACHE_MODE = 44
_SET_MAX_CERT_LIST = 51
_SET_GROUPS_LIST = 92
_GET_MIN_PROTO_VERSION = 130
_GET_MAX_PROTO_VERSION = 131
_SESS_CACHE_OFF = 0


class UnavailableError(Exception):
    """The SSL_CTX cannot be reached in this process; the text says why."""


def set_groups(context: ssl.SSLContext, groups: str) -> bool:
    """Limit key exchanges to the groups of SSL_CTX_set1_groups_list(3); whether OpenSSL takes the list.

    Raises UnavailableError.
    """
    return _controls().call(context, _SET_GROUPS_LIST, 0, groups.encode("ascii"))


def set_max_certificate_bytes(context: ssl.SSLContext, size: int) -> None:
    """Limit the size of a peer's certificate chain (SSL_CTX_set_max_cert_list(3)). Raises UnavailableError."""
    _controls().call(context, _SET_MAX_CERT_LIST, size)


def disable_session_cache(context: ssl.SSLContext) -> None:
    """Keep no sessions, so that TLS 1.2 resumes none by its ID (SSL_CTX_set_session_cache_mode(3)).

    Raises UnavailableError.
    """
    _controls().call(context, _SET_SESS_CACHE_MODE, _SESS_CACHE_OFF)


class _Controls:
    """SSL_CTX_ctrl, on the contexts of this process. Raises UnavailableError."""

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
        """Compare what SSL_CTX_ctrl reads with what was set through `ssl`."""
        versions = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        contexts = []
        for version in versions:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = context.maximum_version = version
            contexts.append(context)
        addresses = [self._address(context) for context in contexts]
        # Before anything is read at these addresses: what malloc gives, and not a small number or a flag.
        if not all(address and address > 1 << 16 and address % 8 == 0 for address in addresses):
            raise UnavailableError("an ssl.SSLContext has another layout than expected")
        if len(set(addresses)) < len(addresses) or not all(map(_is_writable, addresses)):
            raise UnavailableError("an ssl.SSLContext has another layout than expected")
        for context, version in zip(contexts, versions, strict=True):
            for which in (_GET_MIN_PROTO_VERSION, _GET_MAX_PROTO_VERSION):
                if self._control(self._address(context), which, 0, None) != version:
                    raise UnavailableError("an ssl.SSLContext has another layout than expected")

    def call(self, context: ssl.SSLContext, command: int, number: int, text: bytes | None = None) -> bool:
        """Call SSL_CTX_ctrl; whether it gives something else than 0, which not every command does for success."""
        try:
            return bool(self._control(self._address(context), command, number, text))
        finally:
            # Of this thread: `ssl` would take what is left there for an error of its own next call.
            self._clear_errors()


def _is_writable(address: int | None) -> bool:
    """Whether memory at an address is mapped, readable and writable; True where the system does not tell (no /proc)."""
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
    """Tried once in a process; the exception is not kept, since its traceback would keep frames."""
    if os.name != "posix":
        return f"not known on {os.name}"
    try:
        return _Controls()
    except UnavailableError as error:
        return str(error)


def unavailable() -> str | None:
    """Why the SSL_CTX cannot be reached in this process; None where it can."""
    outcome = _outcome()
    return outcome if isinstance(outcome, str) else None


def _controls() -> _Controls:
    outcome = _outcome()
    if isinstance(outcome, str):
        raise UnavailableError(outcome)
    return outcome
