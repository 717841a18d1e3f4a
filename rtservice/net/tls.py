"""Build TLS contexts, of `ssl` or pyOpenSSL, from certificate and key files: one certificate, or one for each name."""

from __future__ import annotations

import codecs
import os
import re
import ssl
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rtservice.net import crl, openssl, x509
from rtservice.net.client_hello import ALPNGate
from rtservice.net.crl import RevocationLists
from rtservice.net.groups import SSL_GROUPS
from rtservice.net.tls_bounds import MAX_CLIENT_CERTIFICATES
from rtservice.steps import Steps, finish
from rtservice.utf8 import NotUTF8Error, check_mark

if TYPE_CHECKING:
    from rtservice.net.pyopenssl import PyOpenSSLContext

Minimum = Literal["1.2", "1.3"]
Library = Literal["ssl", "pyopenssl"]
Context: TypeAlias = "ssl.SSLContext | PyOpenSSLContext"

# Forward secrecy and authenticated encryption only: the TLS 1.2 suites of Mozilla's "intermediate" configuration
# without finite-field Diffie-Hellman, which no current client needs. All suites of TLS 1.3 meet this.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

# A file may also contain a key or text.
_PEM_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)

# A name that a client can request (RFC 6066, section 3): visible ASCII characters, at least one of which is not a dot.
_SERVED = re.compile(r"(?=.*[^.])[!-~]+")

# Suffixes of files in a directory of certificates. Hidden files are skipped, as with *.pem in a shell.
_DIRECTORY_SUFFIXES = (".pem", ".key")

# openssl/ssl.h. `ssl` does not define them. A compressed certificate chain (RFC 8879) could expand to a thousand times
# the bytes that the client sent.
_OP_PRIORITIZE_CHACHA = 1 << 21
_OP_NO_RX_CERTIFICATE_COMPRESSION = 1 << 33

_MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TLSError(Exception):
    """No context can be built from the files. The text names the file and the error."""


class Files:
    """Reads certificates and keys from the file system.

    `texts` and `entries` record the results for RecordedFiles: a process without permission to read a key can build its
    context from what another process has read.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.entries: dict[str, list[str]] = {}

    def read(self, path: str, what: str) -> str:
        """Return the text of a file. Raises TLSError, which names the kind of file, `what`."""
        try:
            # Non-blocking: a pipe would block the reload, and with it the whole service.
            with open(path, "rb", opener=_open_nonblocking) as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    text = self.texts[path] = _text(file.read())
                    return text
        except NotUTF8Error as error:
            raise TLSError(f"the {what} {path!r} {error}") from None
        except OSError as error:
            raise TLSError(f"cannot read the {what} {path!r}: {_reason(error)}") from error
        raise TLSError(f"cannot read the {what} {path!r}: it is not a regular file")

    def exists(self, path: str) -> bool:
        """Return whether the file exists. A broken symbolic link counts."""
        return os.path.lexists(path)

    def names(self, directory: str) -> list[str]:
        """Return the names of certificate and key files in a directory. Raises TLSError."""
        try:
            entries = self.entries[directory] = _entries(directory)
        except OSError as error:
            raise TLSError(f"cannot read the directory {directory!r}: {_reason(error)}") from error
        return entries


class RecordedFiles(Files):
    """Returns what another Files has read."""

    def __init__(self, texts: dict[str, str], entries: dict[str, list[str]]) -> None:
        self.texts = texts
        self.entries = entries

    def read(self, path: str, what: str) -> str:
        return self.texts[path]

    def exists(self, path: str) -> bool:
        return path in self.texts

    def names(self, directory: str) -> list[str]:
        return self.entries[directory]


@dataclass(frozen=True)
class Certificate:
    """A server certificate: its file, its names as in x509.CertificateDescription, and its validity.

    The times are in seconds since the epoch. The certificate may have expired or not be valid yet.
    """

    path: str
    names: tuple[str, ...]
    not_before: int
    not_after: int

    @property
    def served(self) -> tuple[str, ...]:
        """The names that clients can request by SNI, without a dot at the end."""
        return tuple(dict.fromkeys(name.removesuffix(".") for name in self.names if _SERVED.fullmatch(name)))


class ServerContext(ssl.SSLContext):
    """An `ssl` context for a server, with its ALPN protocols.

    A context that SNI selects instead has the same `alpn`.
    """

    alpn: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class CertificateContext:
    """The context of one certificate, and warnings for the log."""

    context: Context
    certificate: Certificate
    warnings: tuple[str, ...]


@dataclass
class ServerNames:
    """The contexts of a directory by server name. None stands for the current default context.

    All successive default contexts of a listener look names up here. So a connection that still uses an old default
    keeps no other contexts in memory.
    """

    contexts: dict[str, Context | None] = field(default_factory=dict)

    def find(self, name: str) -> Any:
        """Return the context for a requested name, or None for the default."""
        name = name.lower().removesuffix(".")
        wildcard = "*." + name.partition(".")[2]
        return self.contexts[name] if name in self.contexts else self.contexts.get(wildcard)


@dataclass(frozen=True)
class Reusable:
    """Contexts that the next load of the same source can reuse.

    The keys of `made` are digests of all inputs of a context. Building a context takes 1 to 3 ms, and a directory may
    contain thousands of certificates of which one was renewed.
    """

    names: ServerNames = field(default_factory=ServerNames)
    made: Mapping[bytes, CertificateContext] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedTLS:
    """The result of loading: a context, and the certificates that it may present.

    `revocation` describes the lists that clients' certificates are checked against. `warnings` are for the log: limits
    that this process cannot apply. `reusable` is for the next load of the same source. `take_effect` makes `contexts`
    its names.
    """

    context: Context
    certificates: tuple[Certificate, ...]
    revocation: RevocationLists | None = None
    warnings: tuple[str, ...] = ()
    reusable: Reusable = field(default_factory=Reusable, repr=False)
    contexts: dict[str, Context | None] = field(default_factory=dict, repr=False)

    def take_effect(self) -> None:
        """Use these certificates from now on, also for connections that began with an earlier context."""
        self.reusable.names.contexts = self.contexts


def alpn_gate(context: ssl.SSLContext) -> ALPNGate | None:
    """Return an ALPNGate for a connection to a server with this context; None if the context has no ALPN."""
    alpn = context.alpn if isinstance(context, ServerContext) else ()
    return ALPNGate(alpn) if alpn else None


def check_resumed(connection: ssl.SSLObject | ssl.SSLSocket, now: float | None = None) -> str | None:
    """Return the reason to reject a resumed session after the handshake, or None.

    OpenSSL does not verify a client's certificate again when it resumes a session, and renews its tickets forever. The
    contexts of this module resume no session with a certificate if `openssl` is available; this check covers all
    others. `now` is in seconds since the epoch.
    """
    if not connection.session_reused:
        return None
    # As DER: `ssl` cannot decode a certificate with a name that is not UTF-8.
    certificate = connection.getpeercert(binary_form=True)
    if not certificate:
        return None
    not_after = x509.describe_der(certificate).not_after
    return "client certificate has expired" if not_after < (time.time() if now is None else now) else None


@dataclass(frozen=True)
class _ClientTrust:
    """PEM text to verify clients' certificates with: authorities, and revocation lists or None."""

    authorities: str
    revoked: str | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """Both texts; "" without revocation lists."""
        return self.authorities, self.revoked or ""


@dataclass(frozen=True, kw_only=True)
class _Policy:
    """TLS settings that apply to all certificates of a listener.

    With `client_ca`, a PEM file, a client must present a certificate signed by one of its authorities. Its sessions are
    not resumed, since nothing would verify the certificate again. `client_crl` is a PEM file with a current revocation
    list of each authority in the chain of such a certificate: without a list, or after its next update, all clients of
    this authority are rejected.

    `alpn` are the supported protocols (RFC 7301), in order of preference. With `library="pyopenssl"` contexts are for
    Twisted's TLS, which is slower, for protocols that need pyOpenSSL's objects.
    """

    client_ca: str | None = None
    client_crl: str | None = None
    minimum: Minimum = "1.2"
    alpn: tuple[str, ...] = ()
    library: Library = "ssl"

    def _trust(self, files: Files) -> tuple[_ClientTrust | None, RevocationLists | None]:
        """Return the trust for clients' certificates, and the description of its revocation lists. Raises TLSError."""
        if self.client_ca is None:
            return None, None
        authorities = _certificates(files, self.client_ca, "client CA")
        if self.client_crl is None:
            return _ClientTrust(authorities), None
        revoked, described = _revocation_lists(files, self.client_crl)
        return _ClientTrust(authorities, revoked), described

    def _make(self, path: str, certificates: str, private_key: _Key, trust: _ClientTrust | None) -> CertificateContext:
        """Build a context with this policy for `certificates`, PEM text read from `path`. Raises TLSError."""
        context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _MINIMUM[self.minimum]
        context.set_ciphers(_CIPHERS)
        # Renegotiation lets a client cause work at no cost (CVE-2011-1473); TLS 1.3 has none.
        context.options |= ssl.OP_NO_RENEGOTIATION
        # The server's order, except for a client that prefers ChaCha20, since it has no AES in hardware.
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | _OP_PRIORITIZE_CHACHA
        if sys.maxsize > 1 << 33:  # options are a C long in `ssl`
            context.options |= _OP_NO_RX_CERTIFICATE_COMPRESSION
        certificate = _load_pair(context, path, certificates, private_key)
        if trust is not None:
            _verify_clients(context, trust)
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
            context.alpn = tuple(name.encode("ascii") for name in self.alpn)
        if self.library == "pyopenssl":  # after `ssl` has checked the files
            made, warning = self._pyopenssl(context, certificates, private_key.text, trust)
            return CertificateContext(made, certificate, (warning,) if warning else ())
        warning = SSL_GROUPS.limit(context)
        return CertificateContext(context, certificate, (warning,) if warning else ())

    def _pyopenssl(
        self, like: ssl.SSLContext, certificates: str, private_key: str, trust: _ClientTrust | None
    ) -> tuple[PyOpenSSLContext, str | None]:
        """Return the pyOpenSSL context equal to the `ssl` context `like`, and a warning about its groups or None.

        Raises TLSError.
        """
        try:
            from rtservice.net.pyopenssl import PyOpenSSLContext
        except ImportError as error:
            raise TLSError(f"library=pyopenssl is not installed; pip install 'twisted[tls]' ({error})") from error
        verified = (None, None) if trust is None else (trust.authorities, trust.revoked)
        with ExitStack() as stack:
            files = [
                None if text is None else stack.enter_context(_named(text))
                for text in (certificates, private_key, *verified)
            ]
            make = partial(
                PyOpenSSLContext,
                certificates=str(files[0]),
                private_key=str(files[1]),
                client_ca=files[2],
                client_crl=files[3],
                minimum=like.minimum_version,
                ciphers=_CIPHERS,
                options=like.options,
                alpn=self.alpn,
            )
            made = make()
            return made, made.limit_groups(make)

    def _policy_files(self) -> tuple[str, ...]:
        return tuple(path for path in (self.client_ca, self.client_crl) if path)


@dataclass(frozen=True)
class ServerTLS(_Policy):
    """Source of one certificate, for every client.

    `private_key` and `certificate` are paths of PEM files. `chain` is the path of a PEM file with the certificates
    between the server's and a root, or None.
    """

    private_key: str
    certificate: str
    chain: str | None = None

    def load(self, files: Files | None = None) -> LoadedTLS:
        """Read the files, and build the context. Raises TLSError."""
        return finish(self.loading(files))

    def loading(self, files: Files | None = None, reusable: Reusable | None = None) -> Steps[LoadedTLS]:
        """Do the work of `load` in steps: here in one. Nothing is reused."""
        yield from ()
        files = files or Files()
        certificates = _certificates(files, self.certificate, "certificate")
        if self.chain is not None:
            certificates += "\n" + _certificates(files, self.chain, "certificate chain")
        trust, revocation = self._trust(files)
        made = self._make(self.certificate, certificates, _Key.read(files, self.private_key), trust)
        return LoadedTLS(made.context, (made.certificate,), revocation, made.warnings)

    def files(self) -> tuple[str, ...]:
        """Return the paths that `load` reads."""
        return (*(path for path in (self.private_key, self.certificate, self.chain) if path), *self._policy_files())


@dataclass(frozen=True)
class DirectoryTLS(_Policy):
    """Source of the certificates in a directory, selected by SNI (RFC 6066, section 3).

    Every `*.pem` in `directory` contains a certificate, the certificates between it and a root, and its private key,
    which may also be in NAME.key beside NAME.pem. A certificate serves its DNS names, or without any alternative name,
    its common name. `*.example.org` matches one label in place of the star, unless another certificate has the exact
    name. A dot at the end of a name is ignored. A client that requests no name or an unknown one gets the certificate
    of `default.pem`, or without this file, of the first file in the order of `sorted`. Another file may have names of
    `default.pem` too; its certificate is used for them.
    """

    directory: str

    def load(self, files: Files | None = None) -> LoadedTLS:
        """Read the files of the directory, and build the contexts. Raises TLSError, also if files share a name."""
        loaded = finish(self.loading(files))
        loaded.take_effect()
        return loaded

    def loading(self, files: Files | None = None, reusable: Reusable | None = None) -> Steps[LoadedTLS]:
        """Do the work of `load` in steps, one for each file and certificate. Changes nothing until `take_effect`.

        Contexts in `reusable` that were built from the same bytes are reused.
        """
        files = files or Files()
        before = reusable or Reusable()
        kept: dict[bytes, CertificateContext] = {}
        contexts: dict[str, Context | None] = {}
        owners: dict[str, str] = {}
        certificates = []
        warnings: dict[str, None] = {}
        trust, revocation = self._trust(files)
        names = self._names(files)
        if not names:
            raise TLSError(f"no certificate in the directory {self.directory!r}; add a file NAME.pem")
        first = _DEFAULT if _DEFAULT in names else min(names)
        default: Context | None = None
        # default.pem is last, since it may repeat names of others.
        for name in sorted(names, key=lambda name: (name == _DEFAULT, name)):
            yield
            path = os.path.join(self.directory, name)
            text = files.read(path, "certificate")
            found = _pem_certificates(text, path, "certificate")
            key = self._key(files, path, text)
            if name == first:
                # Never reused: the default context looks up the others, and must find the earlier ones until
                # `take_effect`.
                made = self._make_checked(path, found, key, trust)
                default = made.context
            else:
                digest = _digest((found, key.text, *(trust.texts if trust is not None else ())))
                if digest in before.made:
                    made = before.made[digest]
                    made = replace(made, certificate=replace(made.certificate, path=path))
                else:
                    made = self._make_checked(path, found, key, trust)
                    _find_no_other(made.context)
                kept[digest] = made
            certificates.append(made.certificate)
            warnings |= dict.fromkeys(made.warnings)
            for served in made.certificate.served:
                owner = owners.setdefault(served, path)
                if owner != path and name != _DEFAULT:
                    raise TLSError(f"{owner!r} and {path!r} are both for {served!r}; remove one of them")
                # None, not left out: a name of the default has precedence over a wildcard.
                contexts.setdefault(served, None if name == first else made.context)
        assert default is not None  # it is one of the names
        _choose_by_name(default, before.names.find)
        return LoadedTLS(
            default, tuple(certificates), revocation, tuple(warnings), Reusable(before.names, kept), contexts
        )

    def _key(self, files: Files, path: str, text: str) -> _Key:
        """Return the private key of the certificate in the file `path` with this text. Raises TLSError."""
        if "PRIVATE KEY-----" in text:
            return _Key(path, text)
        private_key = path.removesuffix(".pem") + ".key"
        if not files.exists(private_key):
            raise TLSError(f"no private key for {path!r}; add the key to it, or as {private_key!r}")
        return _Key.read(files, private_key)

    def _make_checked(self, path: str, certificates: str, key: _Key, trust: _ClientTrust | None) -> CertificateContext:
        try:
            return self._make(path, certificates, key, trust)
        except TLSError:
            _check_certificates(certificates, path, "certificate")  # reports an error of the certificate first
            raise

    def _names(self, files: Files) -> list[str]:
        return [name for name in files.names(self.directory) if name.endswith(".pem")]

    def files(self) -> tuple[str, ...]:
        """Return the paths that `load` reads. The directory stands for the files in it."""
        return (self.directory, *self._policy_files())


_DEFAULT = "default.pem"


def _choose_by_name(default: Context, find: Callable[[str], Any]) -> None:
    """Switch connections that begin with the default context to the context for the requested name.

    References go from the default to the others and never back, so that contexts are freed without the garbage
    collector. A reload may replace thousands of certificates and keys, which would otherwise stay in memory until a
    collection.
    """
    if isinstance(default, ssl.SSLContext):
        default.sni_callback = _chooser(find)
    else:
        default.find_by_name(find)


def _find_no_other(context: Context) -> None:
    """Keep a connection that was switched to this context.

    After a HelloRetryRequest in TLS 1.3, OpenSSL runs the SNI callback again, now that of the selected context. Without
    one, it would run the default's callback, whose Python object may have been freed by a reload: the process would
    crash. The second name must equal the first (RFC 8446, section 4.1.2).
    """
    if isinstance(context, ssl.SSLContext):
        context.sni_callback = _keep
    else:
        context.find_by_name(_find_nothing)


def _chooser(find: Callable[[str], ssl.SSLContext | None]) -> Callable[[Any, str | None, Any], None]:
    """Return an `sni_callback` that selects the context for the requested name."""

    def choose(connection: Any, name: str | None, context: object) -> None:
        chosen = None if name is None else find(name)
        if chosen is not None:
            connection.context = chosen

    return choose


def _keep(connection: object, name: str | None, context: object) -> None:
    """Keep the context: an `sni_callback`."""


def _find_nothing(name: str) -> None:
    return None


def _verify_clients(context: ssl.SSLContext, trust: _ClientTrust) -> None:
    """Require clients to present a certificate of one of these authorities, and do not resume their sessions."""
    context.load_verify_locations(cadata=trust.authorities)
    context.verify_mode = ssl.CERT_REQUIRED
    if trust.revoked is not None:
        with _named(trust.revoked) as file:
            context.load_verify_locations(cafile=file)  # cadata= accepts only certificates
        # For each certificate in a chain, as nginx and HAProxy do: an authority may be revoked too.
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    context.num_tickets = 0  # TLS 1.3
    context.options |= ssl.OP_NO_TICKET
    with suppress(openssl.UnavailableError):  # see check_resumed, and tls_bounds
        openssl.disable_session_cache(context)
        openssl.set_max_certificate_bytes(context, MAX_CLIENT_CERTIFICATES)


def ignore_bad_names() -> None:
    """Suppress the traceback of a client that requests a server name which is not ASCII (RFC 6066, section 3).

    `ssl` rejects such a client before it calls the SNI callback, and reports the exception to `sys.unraisablehook`,
    which prints a traceback with text of the client.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, UnicodeDecodeError) and isinstance(unraisable.object, bytes)):
            before(unraisable)

    sys.unraisablehook = hook


def fingerprint(paths: Iterable[str]) -> tuple[object, ...]:
    """Return a value that differs once a file, or a certificate or key in a directory, has changed.

    It uses only os.stat. Missing files are no error. Call it with `files()` before `load`, so that changes during the
    load are detected.
    """
    return finish(fingerprinting(paths))


def fingerprinting(paths: Iterable[str]) -> Steps[tuple[object, ...]]:
    """Do the work of `fingerprint` in steps, one for each file."""
    found: list[object] = []
    for path in paths:
        try:
            files = [os.path.join(path, name) for name in sorted(_entries(path))]
        except NotADirectoryError:
            files = [path]
        except OSError as error:
            found.append((path, error.errno))
            continue
        for file in files:
            yield
            try:
                seen = os.stat(file)
            except OSError as error:
                found.append((file, error.errno))
            else:
                # With the change time: fixing permissions does not change the modification time.
                found.append((file, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns))
    return tuple(found)


def _entries(directory: str) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(_DIRECTORY_SUFFIXES) and not name.startswith(".")]


@dataclass(frozen=True)
class _Key:
    """A private key: PEM text that contains it, and the file that it was read from."""

    path: str
    text: str = field(repr=False)

    @classmethod
    def read(cls, files: Files, path: str) -> _Key:
        """Read the key from a file. Raises TLSError."""
        return cls(path, files.read(path, "private key"))


def _load_pair(context: ssl.SSLContext, path: str, certificates: str, private_key: _Key) -> Certificate:
    def no_passphrase() -> str:  # without this, OpenSSL prompts on the terminal, which a service may not have
        raise TLSError(f"the private key {private_key.path!r} is encrypted; decrypt it, for example with openssl pkey")

    try:
        # `ssl` accepts only file names, and the whole chain in one file.
        with _named(certificates) as certificate_file, _named(private_key.text) as key_file:
            context.load_cert_chain(certificate_file, key_file, no_passphrase)
    except ssl.SSLError as error:
        # NO_CERTIFICATE_ASSIGNED: no certificate in the file has a key of this type.
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise TLSError(
                f"the private key {private_key.path!r} does not belong to the certificate {path!r}"
            ) from error
        if error.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            raise TLSError(f"the certificate {path!r} is too weak: {error.reason}") from error
        if error.reason == "INVALID_CERTIFICATE":  # an invalid extension
            raise TLSError(f"OpenSSL rejects the certificate {path!r}: {error.reason}") from error
        raise TLSError(f"no usable private key in PEM form in {private_key.path!r}") from error
    except OSError as error:
        raise TLSError(f"cannot create a temporary file for the certificate {path!r}: {_reason(error)}") from error
    try:
        # The first certificate is the server's.
        names, not_before, not_after = x509.describe(_PEM_CERTIFICATE.findall(certificates)[0])
    except ValueError as error:
        raise TLSError(f"the certificate {path!r} cannot be parsed: {error}") from error
    return Certificate(path, names, not_before, not_after)


@contextmanager
def _named(text: str) -> Iterator[str]:
    """Provide the name of a temporary file with this text, in memory if possible. Raises OSError."""
    with ExitStack() as stack:
        if hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd"):
            file: Any = stack.enter_context(open(os.memfd_create("pem"), "wb"))
            name = f"/proc/self/fd/{file.fileno()}"
        else:
            file = stack.enter_context(tempfile.NamedTemporaryFile("wb", suffix=".pem"))
            name = file.name
        file.write(text.encode("ascii", "replace"))
        file.flush()
        yield name


def _certificates(files: Files, path: str, what: str) -> str:
    """Return the certificates in a PEM file: at least one, and all valid. Raises TLSError."""
    found = _pem_certificates(files.read(path, what), path, what)
    _check_certificates(found, path, what)
    return found


def _pem_certificates(text: str, path: str, what: str) -> str:
    """Return the certificates, at least one, in a text that may contain more. Raises TLSError."""
    found = _PEM_CERTIFICATE.findall(text)
    if not found or len(found) != text.count("-----BEGIN CERTIFICATE-----"):  # one is not terminated
        raise TLSError(f"no usable {what} in PEM form in {path!r}")
    return "\n".join(found)


def _check_certificates(found: str, path: str, what: str) -> None:
    """Raise TLSError if a certificate is malformed. Takes half a millisecond."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=found)
    except (ssl.SSLError, ValueError, TypeError) as error:  # also a byte that is not ASCII
        raise TLSError(f"no usable {what} in PEM form in {path!r}") from error


def _digest(texts: Iterable[str]) -> bytes:
    """Return a digest of these texts and their boundaries."""
    digest = sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return digest.digest()


def _revocation_lists(files: Files, path: str) -> tuple[str, RevocationLists]:
    """Return the revocation lists (at least one) in a PEM file, and their description. Raises TLSError."""
    try:
        blocks = crl.pem_blocks(files.read(path, "revocation list"))
        text = "\n".join(blocks)
        described = crl.describe(path, blocks)
        with _named(text) as file:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=file)
    except (ssl.SSLError, ValueError) as error:
        raise TLSError(f"no usable revocation list in PEM form in {path!r}") from error
    except OSError as error:
        raise TLSError(f"cannot create a temporary file for the revocation list {path!r}: {_reason(error)}") from error
    return text, described


def _text(content: bytes) -> str:
    """Decode a PEM file. Only comments can be other than ASCII, and are not kept exactly. Raises NotUTF8Error."""
    check_mark(content)
    content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return content.decode("ascii", "replace")


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _reason(error: OSError) -> str:
    return (error.strerror or "unknown error").lower()
