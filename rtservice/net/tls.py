"""Certificates and keys → `ssl.SSLContext`."""

from __future__ import annotations

import re
import ssl
import tempfile
from dataclasses import dataclass
from typing import Literal

Minimum = Literal["1.2", "1.3"]

# Forward secrecy and authenticated encryption only: the TLS 1.2 suites of Mozilla's "intermediate" configuration, less
# those with finite-field Diffie-Hellman, which no client of today needs. TLS 1.3's suites are all of this kind.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

# A file may hold more than certificates: a key in the same one is common, and text before them.
_PEM_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)

# The groups of the same configuration; OpenSSL's own choice has X448 and P-521 too.
_GROUPS = "X25519:prime256v1:secp384r1"

_OP_PRIORITIZE_CHACHA = 1 << 21  # openssl/ssl.h; `ssl` has no name for it

_MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TLSError(Exception):
    """The files cannot make a context; the text names the file and says what is wrong with it."""


@dataclass(frozen=True)
class ServerTLS:
    """What a TLS listener shows and asks for.

    `private_key` and `certificate` are paths of PEM files; `chain` is one with the certificates between the server's
    and a root. With `client_ca`, a PEM file, a client has to show a certificate that one of its authorities signed.
    `alpn` are the protocols offered (RFC 7301), the preferred one first.
    """

    private_key: str
    certificate: str
    chain: str | None = None
    client_ca: str | None = None
    minimum: Minimum = "1.2"
    alpn: tuple[str, ...] = ()

    def context(self) -> ssl.SSLContext:
        """Read the files. Raises TLSError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _MINIMUM[self.minimum]
        context.set_ciphers(_CIPHERS)
        # A client that renegotiates makes the server work for nothing (CVE-2011-1473); TLS 1.3 has none of it.
        context.options |= ssl.OP_NO_RENEGOTIATION
        # The server's order, but for a client that puts ChaCha20 first, which has no AES in hardware.
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | _OP_PRIORITIZE_CHACHA
        if hasattr(context, "set_groups"):  # Python 3.15; before, the groups are OpenSSL's own choice
            context.set_groups(_GROUPS)
        certificates = _certificates(self.certificate, "certificate")
        if self.chain is not None:
            certificates += "\n" + _certificates(self.chain, "certificate chain")
        self._load(context, certificates)
        if self.client_ca is not None:
            context.load_verify_locations(cadata=_certificates(self.client_ca, "client CA"))
            context.verify_mode = ssl.CERT_REQUIRED
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
        return context

    def _load(self, context: ssl.SSLContext, certificates: str) -> None:
        _read(self.private_key, "private key")

        def no_passphrase() -> str:  # without this, OpenSSL would ask on a terminal that a service may not have
            raise TLSError(f"the private key {self.private_key!r} is encrypted: give it without a passphrase")

        # `ssl` takes names of files alone, and the whole chain in one.
        with tempfile.NamedTemporaryFile("w", encoding="ascii", suffix=".pem") as file:
            file.write(certificates)
            file.flush()
            try:
                context.load_cert_chain(file.name, self.private_key, no_passphrase)
            except ssl.SSLError as error:
                # The third: a key of a kind for which there is no certificate at all.
                if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
                    raise TLSError(
                        f"the private key {self.private_key!r} does not belong to the certificate {self.certificate!r}"
                    ) from error
                if error.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
                    raise TLSError(f"the certificate {self.certificate!r} is too weak: {error.reason}") from error
                raise TLSError(f"no usable private key in PEM form in {self.private_key!r}") from error


def _certificates(path: str, what: str) -> str:
    """The text of a PEM file that has at least one certificate in it, and none that cannot be read."""
    text = _read(path, what)
    found = _PEM_CERTIFICATE.findall(text)
    try:
        if len(found) != text.count("-----BEGIN CERTIFICATE-----"):
            raise ValueError("one of them does not end")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata="\n".join(found))
    except (ssl.SSLError, ValueError, TypeError) as error:  # also none at all; and a byte that is not ASCII
        raise TLSError(f"no usable {what} in PEM form in {path!r}") from error
    return "\n".join(found)


def _read(path: str, what: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise TLSError(f"cannot read the {what} {path!r}: {(error.strerror or 'unknown error').lower()}") from error
