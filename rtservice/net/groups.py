"""Limit the key exchange groups of TLS to X25519, P-256, P-384 and their hybrids with ML-KEM.

OpenSSL's default includes finite fields: a client that requests ffdhe8192 costs the server 120 ms of CPU before it is
authenticated, at no cost to itself (CVE-2002-20001). X25519 costs 0.8 ms. The public API to choose groups is
`SSLContext.set_groups`, from Python 3.15. Older versions set them below `ssl` (see `openssl`). Where this is not
possible, `set_ecdh_curve` leaves only P-256, which costs a client that offers X25519 first one round trip.

The limit is tested: the first limited context in a process has to reject a ClientHello that offers only finite fields,
and to accept one that offers X25519 and P-256.
"""

from __future__ import annotations

import ssl
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rtservice.net import openssl

_CLASSIC = "X25519:P-256:P-384"

# Tried in this order. The first needs OpenSSL 3.5: `?` marks an optional group, and groups after `/` are for clients
# that support none of those before it. The second is for an older OpenSSL with an ML-KEM provider.
GROUP_LISTS = (
    f"?X25519MLKEM768:?SecP256r1MLKEM768:?SecP384r1MLKEM1024/{_CLASSIC}",
    f"X25519MLKEM768:{_CLASSIC}",
    _CLASSIC,
)
FALLBACK_CURVE = "prime256v1"

# Numbers of RFC 8446, section 4.2.7.
_X25519, _P256 = 29, 23
_X448, _P521, _FFDHE2048, _FFDHE3072, _FFDHE4096, _FFDHE6144, _FFDHE8192 = 30, 25, 256, 257, 258, 259, 260

_T = TypeVar("_T")

# A function that limits the groups of a context, and returns False if the library cannot.
Limiter = Callable[[_T], bool]


@dataclass
class GroupPolicy(Generic[_T]):
    """Limits the groups of one library's contexts, with the first of several functions that passes a test.

    `answer` returns the bytes that a context sends in reply to a ClientHello. The functions in `full` set all accepted
    groups, `fallback` sets only P-256, and `why` returns the reason why none of `full` works.
    """

    answer: Callable[[_T, bytes], bytes]
    full: Sequence[Limiter[_T]]
    fallback: Limiter[_T]
    why: Callable[[], str]
    _proven: tuple[Limiter[_T], str | None] | None = field(default=None, init=False)

    def limit(self, context: _T, probe: Callable[[], _T] | None = None) -> str | None:
        """Limit the groups of a context that has its certificate. Returns a warning for the log, or None.

        `probe` returns an equal context, for a library whose contexts cannot be changed once a connection uses them.
        """
        if self._proven is not None:
            limiter, warning = self._proven
            if limiter(context):
                return warning
        for limiter in (*self.full, self.fallback):
            proof = context if probe is None else probe()
            if limiter(context) and limiter(proof) and self._holds(proof):
                limited = f"TLS key exchange is limited to P-256, without X25519: {self.why()}"
                warning = f"{limited}; most clients need one more round trip" if limiter is self.fallback else None
                self._proven = limiter, warning
                return warning
        # The last function stays applied. The certificate may be the reason why the test's ClientHello is rejected.
        return f"TLS key exchange is not proven to be limited: {self.why()}; a handshake may cost 120 ms of CPU"

    def _holds(self, context: _T) -> bool:
        refused = self.answer(context, client_hello([_FFDHE2048, *_UNWANTED], (_FFDHE2048, _FFDHE_SHARE)))
        accepted = self.answer(context, client_hello([_X25519, _P256], (_X25519, _X25519_SHARE)))
        return refused[:1] == _ALERT and accepted[:1] == _HANDSHAKE


_ALERT, _HANDSHAKE = b"\x15", b"\x16"  # record types (RFC 8446, section 5.1)
_UNWANTED = (_FFDHE3072, _FFDHE4096, _FFDHE6144, _FFDHE8192, _X448, _P521)
# Valid public keys: the base point of X25519, and the generator of ffdhe2048 (RFC 7919, appendix A).
_X25519_SHARE = b"\x09" + bytes(31)
_FFDHE_SHARE = bytes(255) + b"\x02"


def client_hello(groups: Sequence[int], share: tuple[int, bytes] | None = None) -> bytes:
    """Return the record of a TLS 1.3 ClientHello that offers `groups`, with `share`, a group and its public key."""

    def vector(size: str, body: bytes) -> bytes:
        return struct.pack(size, len(body)) + body

    def extension(number: int, body: bytes) -> bytes:
        return struct.pack("!H", number) + vector("!H", body)

    # ECDSA, RSA-PSS, Ed25519 and Ed448: the server's certificate may use any of them.
    signatures = [0x0403, 0x0503, 0x0603, 0x0804, 0x0805, 0x0806, 0x0809, 0x080A, 0x080B, 0x0807, 0x0808]
    signatures += [0x081A, 0x081B, 0x081C, 0x0904, 0x0905, 0x0906]  # ECDSA on Brainpool curves, ML-DSA
    shares = b"" if share is None else struct.pack("!H", share[0]) + vector("!H", share[1])
    extensions = (
        extension(43, vector("!B", b"\x03\x04"))  # supported_versions
        + extension(10, vector("!H", struct.pack(f"!{len(groups)}H", *groups)))  # supported_groups
        + extension(13, vector("!H", struct.pack(f"!{len(signatures)}H", *signatures)))  # signature_algorithms
        + extension(51, vector("!H", shares))  # key_share
    )
    suites = struct.pack("!3H", 0x1301, 0x1302, 0x1303)
    body = b"\x03\x03" + bytes(32) + vector("!B", b"") + vector("!H", suites) + vector("!B", b"\0")
    message = b"\x01\0" + vector("!H", body + vector("!H", extensions))
    return b"\x16\x03\x01" + vector("!H", message)


# --- the contexts of `ssl` ---


def _answer(context: ssl.SSLContext, hello: bytes) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(hello)
    with suppress(ssl.SSLError):
        context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    return outgoing.read()


def _by_set_groups(context: ssl.SSLContext) -> bool:  # Python 3.15
    set_groups = getattr(context, "set_groups", None)
    return set_groups is not None and any(_taken(set_groups, groups) for groups in GROUP_LISTS)


def _taken(set_groups: Callable[[str], None], groups: str) -> bool:
    try:
        set_groups(groups)
    except (ssl.SSLError, ValueError):
        return False
    return True


def _below_ssl(context: ssl.SSLContext) -> bool:
    with suppress(openssl.UnavailableError):
        return any(openssl.set_groups(context, groups) for groups in GROUP_LISTS)
    return False


def _by_curve(context: ssl.SSLContext) -> bool:
    context.set_ecdh_curve(FALLBACK_CURVE)
    return True


SSL_GROUPS = GroupPolicy(
    answer=_answer,
    full=(_by_set_groups, _below_ssl),
    fallback=_by_curve,
    why=lambda: openssl.unavailable() or "OpenSSL refuses the list of groups",
)
