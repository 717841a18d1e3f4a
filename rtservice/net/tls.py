"""Certificates and keys → a context of `ssl` or of pyOpenSSL, with one certificate or with one for each name."""

from __future__ import annotations

import codecs
import os
import re
import ssl
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from rtservice.net import crl, openssl, x509
from rtservice.net.client_hello import ALPNGate
from rtservice.net.crl import RevocationLists
from rtservice.net.groups import SSL_GROUPS
from rtservice.net.tls_bounds import MAX_CLIENT_CERTIFICATES
from rtservice.utf8 import NotUTF8Error, check_mark

if TYPE_CHECKING:
    from rtservice.net.pyopenssl import PyOpenSSLContext

Minimum = Literal["1.2", "1.3"]
Library = Literal["ssl", "pyopenssl"]
Context: TypeAlias = "ssl.SSLContext | PyOpenSSLContext"

_Result = TypeVar("_Result")
# Work that takes long with many files: its result comes after any number of steps, between which others are served. A
# step takes a few milliseconds at most, one certificate or less.
Steps: TypeAlias = Generator[None, None, _Result]

# Forward secrecy and authenticated encryption only: the TLS 1.2 suites of Mozilla's "intermediate" configuration, less
# those with finite-field Diffie-Hellman, which no client of today needs. TLS 1.3's suites are all of this kind.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

# A file may hold more than certificates: a key in the same one is common, and text before them.
_PEM_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)

# In a name that a client can ask for (RFC 6066, section 3): visible characters of ASCII, of which one is not a dot.
_SERVED = re.compile(r"(?=.*[^.])[!-~]+")

# In a directory of certificates; those of hidden files are left out, as a shell's *.pem would.
_DIRECTORY_SUFFIXES = (".pem", ".key")

# openssl/ssl.h; `ssl` has no names for them. A compressed chain of certificates (RFC 8879) could be a thousand times
# larger than what a client has sent.
_OP_PRIORITIZE_CHACHA = 1 << 21
_OP_NO_RX_CERTIFICATE_COMPRESSION = 1 << 33

_MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TLSError(Exception):
    """The files cannot make a context; the text names the file and says what is wrong with it."""


class Files:
    """Where certificates and keys are read: the file system.

    `texts` and `entries` are what was read, for RecordedFiles: a process that has not the rights to read a key can make
    its context of what another one has read.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.entries: dict[str, list[str]] = {}

    def read(self, path: str, what: str) -> str:
        """The text of a file; `what` it is, is for the TLSError."""
        try:
            # A pipe would keep a reload, and with it the whole service, waiting.
            with open(path, "rb", opener=_open_nonblocking) as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    text = self.texts[path] = _text(file.read())
                    return text
        except NotUTF8Error as error:
            raise TLSError(f"the {what} {path!r} {error}") from None
        except OSError as error:
            raise TLSError(f"cannot read the {what} {path!r}: {_reason(error)}") from error
        raise TLSError(f"cannot read the {what} {path!r}: not a regular file")

    def exists(self, path: str) -> bool:
        """Whether there is such a file, be it a broken link."""
        return os.path.lexists(path)

    def names(self, directory: str) -> list[str]:
        """The names of certificates and keys in a directory; raises TLSError."""
        try:
            entries = self.entries[directory] = _entries(directory)
        except OSError as error:
            raise TLSError(f"cannot read the directory {directory!r}: {_reason(error)}") from error
        return entries


class RecordedFiles(Files):
    """What another Files has read."""

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
    """A certificate that is shown: its file, its names as in x509.Description, and when it holds.

    The times are seconds since the epoch. Nothing here says that the certificate holds now.
    """

    path: str
    names: tuple[str, ...]
    not_before: int
    not_after: int

    @property
    def served(self) -> tuple[str, ...]:
        """The names by which clients can ask for it, without a dot at the end; no client can send any other."""
        return tuple(dict.fromkeys(name.removesuffix(".") for name in self.names if _SERVED.fullmatch(name)))


class ServerContext(ssl.SSLContext):
    """A context of `ssl` for a server, and what its connections need beside it.

    `alpn` are the protocols that it has. A context that SNI chooses in its place has the same.
    """

    alpn: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Made:
    """What was made of one certificate; `certificate` says where it was read."""

    context: Context
    certificate: Certificate
    warnings: tuple[str, ...]


@dataclass
class Names:
    """The contexts of a directory but for its default, by name: None is the default, whatever this is by then.

    All defaults that one listener ever had look names up here. So a connection that still holds an old one keeps no
    other contexts in memory.
    """

    contexts: dict[str, Context | None] = field(default_factory=dict)

    def find(self, name: str) -> Any:
        """Return the context for the name that a client asks for; None to stay with the default."""
        name = name.lower().removesuffix(".")
        wildcard = "*." + name.partition(".")[2]
        return self.contexts[name] if name in self.contexts else self.contexts.get(wildcard)


@dataclass(frozen=True)
class Reusable:
    """What the next load of the same source can use.

    `made` is by a digest of all that it was made of: a context takes 1 to 3 ms to make, and a directory may hold
    thousands of certificates of which one was renewed.
    """

    names: Names = field(default_factory=Names)
    made: Mapping[bytes, Made] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedTLS:
    """What was made of the files: a context, and the certificates that its clients may be shown.

    `revocation` describes the lists that clients' certificates are looked up in. `warnings` are for the log: what this
    process cannot do as it should. `reusable` is for the next load of the same source, whose names are `contexts` as
    soon as this takes effect.
    """

    context: Context
    certificates: tuple[Certificate, ...]
    revocation: RevocationLists | None = None
    warnings: tuple[str, ...] = ()
    reusable: Reusable = field(default_factory=Reusable, repr=False)
    contexts: dict[str, Context | None] = field(default_factory=dict, repr=False)

    def take_effect(self) -> None:
        """Have clients be shown these certificates, also those that begin with a context of before."""
        self.reusable.names.contexts = self.contexts


def alpn_gate(context: ssl.SSLContext) -> ALPNGate | None:
    """A gate for a connection that a client begins with this context; None where the context has no ALPN."""
    alpn = context.alpn if isinstance(context, ServerContext) else ()
    return ALPNGate(alpn) if alpn else None


def check_resumed(connection: ssl.SSLObject | ssl.SSLSocket, now: float | None = None) -> str | None:
    """Why a session that was resumed is to be refused, once the handshake is done; None when it is not.

    OpenSSL does not verify a client's certificate again when it resumes a session, and renews its tickets for ever. The
    contexts of this module resume none with a certificate where `openssl` is available; this holds for all others.
    """
    if not connection.session_reused:
        return None
    # As DER: `ssl` cannot decode a name in it that is not UTF-8.
    certificate = connection.getpeercert(binary_form=True)
    if not certificate:
        return None
    not_after = x509.describe_der(certificate).not_after
    return "client certificate has expired" if not_after < (time.time() if now is None else now) else None


@dataclass(frozen=True)
class _ClientTrust:
    """PEM text that clients' certificates are verified with: authorities, and revocation lists if there are any."""

    authorities: str
    revoked: str | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """Both; a part that was not given is empty."""
        return self.authorities, self.revoked or ""


@dataclass(frozen=True, kw_only=True)
class _Policy:
    """What is asked of a client, whichever certificate it is shown.

    With `client_ca`, a PEM file, a client has to show a certificate that one of its authorities signed. Its sessions
    are not resumed: nothing would verify the certificate again. `client_crl` is a PEM file with a revocation list of
    each authority in the chain of such a certificate, which has to be in force: without one, or after its next update,
    all clients of this authority are refused.

    `alpn` are the protocols offered (RFC 7301), the preferred one first. With the library `pyopenssl` contexts are for
    Twisted's own TLS, which is slower, for protocols that ask for its objects.
    """

    client_ca: str | None = None
    client_crl: str | None = None
    minimum: Minimum = "1.2"
    alpn: tuple[str, ...] = ()
    library: Library = "ssl"

    def _trust(self, files: Files) -> tuple[_ClientTrust | None, RevocationLists | None]:
        """What clients' certificates are verified with, and what the log says about it; raises TLSError."""
        if self.client_ca is None:
            return None, None
        authorities = _certificates(files, self.client_ca, "client CA")
        if self.client_crl is None:
            return _ClientTrust(authorities), None
        revoked, described = _revocation_lists(files, self.client_crl)
        return _ClientTrust(authorities, revoked), described

    def _make(self, path: str, certificates: str, private_key: _Key, trust: _ClientTrust | None) -> Made:
        """A context of this policy for the certificates, PEM text that was read from `path`. Raises TLSError."""
        context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _MINIMUM[self.minimum]
        context.set_ciphers(_CIPHERS)
        # A client that renegotiates makes the server work for nothing (CVE-2011-1473); TLS 1.3 has none of it.
        context.options |= ssl.OP_NO_RENEGOTIATION
        # The server's order, but for a client that puts ChaCha20 first, which has no AES in hardware.
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | _OP_PRIORITIZE_CHACHA
        if sys.maxsize > 1 << 33:  # `ssl` takes a C long
            context.options |= _OP_NO_RX_CERTIFICATE_COMPRESSION
        certificate = _load_pair(context, path, certificates, private_key)
        if trust is not None:
            _verify_clients(context, trust)
        if self.alpn:
            context.set_alpn_protocols(list(self.alpn))
            context.alpn = tuple(name.encode("ascii") for name in self.alpn)
        if self.library == "pyopenssl":  # what was read is known to be good now
            made, warning = self._pyopenssl(context, certificates, private_key.text, trust)
            return Made(made, certificate, (warning,) if warning else ())
        warning = SSL_GROUPS.limit(context)
        return Made(context, certificate, (warning,) if warning else ())

    def _pyopenssl(
        self, like: ssl.SSLContext, certificates: str, private_key: str, trust: _ClientTrust | None
    ) -> tuple[PyOpenSSLContext, str | None]:
        """A context with what was read into one of `ssl`, and a warning about its groups."""
        try:
            from rtservice.net.pyopenssl import PyOpenSSLContext
        except ImportError as error:
            raise TLSError(f"library=pyopenssl is not there: pip install 'twisted[tls]' ({error})") from error
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
    """One certificate, shown to every client.

    `private_key` and `certificate` are paths of PEM files; `chain` is one with the certificates between the server's
    and a root.
    """

    private_key: str
    certificate: str
    chain: str | None = None

    def load(self, files: Files | None = None) -> LoadedTLS:
        """Read the files. Raises TLSError."""
        return finish(self.loading(files))

    def loading(self, files: Files | None = None, reusable: Reusable | None = None) -> Steps[LoadedTLS]:
        """The same in steps, here in one; nothing is reused."""
        yield from ()
        files = files or Files()
        certificates = _certificates(files, self.certificate, "certificate")
        if self.chain is not None:
            certificates += "\n" + _certificates(files, self.chain, "certificate chain")
        trust, revocation = self._trust(files)
        made = self._make(self.certificate, certificates, _Key.read(files, self.private_key), trust)
        return LoadedTLS(made.context, (made.certificate,), revocation, made.warnings)

    def files(self) -> tuple[str, ...]:
        """What `load` reads."""
        return (*(path for path in (self.private_key, self.certificate, self.chain) if path), *self._policy_files())


@dataclass(frozen=True)
class DirectoryTLS(_Policy):
    """The certificates of a directory, each for its own names, which clients give by SNI (RFC 6066, section 3).

    Every `*.pem` of `directory` holds a certificate, those between it and a root after it, and its private key, which
    may also be in NAME.key beside NAME.pem. A certificate is for the DNS names in it, or, without any alternative name,
    for its common name; `*.example.org` is for one label in the star's place, where no other has the exact name. A dot
    at the end of a name is ignored. A client that gives no name, or an unknown one, is shown that of `default.pem`, or
    without this that of the first file in the order of `sorted`. The names of `default.pem` may be in another file too,
    whose certificate is shown for them.
    """

    directory: str

    def load(self, files: Files | None = None) -> LoadedTLS:
        """Read the directory and all of its files. Raises TLSError, also when two files are for one name."""
        loaded = finish(self.loading(files))
        loaded.take_effect()
        return loaded

    def loading(self, files: Files | None = None, reusable: Reusable | None = None) -> Steps[LoadedTLS]:
        """The same in steps, one for each file and certificate. Nothing that is in use changes until it takes effect.

        What is in `reusable`, and was made of the same bytes, is not made again.
        """
        files = files or Files()
        before = reusable or Reusable()
        kept: dict[bytes, Made] = {}
        contexts: dict[str, Context | None] = {}
        owners: dict[str, str] = {}
        certificates = []
        warnings: dict[str, None] = {}
        trust, revocation = self._trust(files)
        names = self._names(files)
        if not names:
            raise TLSError(f"no certificate, a file called *.pem, in the directory {self.directory!r}")
        first = _DEFAULT if _DEFAULT in names else min(names)
        default: Context | None = None
        # The one that may repeat names goes last.
        for name in sorted(names, key=lambda name: (name == _DEFAULT, name)):
            yield
            path = os.path.join(self.directory, name)
            text = files.read(path, "certificate")
            found = _pem_certificates(text, path, "certificate")
            key = self._key(files, path, text)
            if name == first:
                # Never reused: it finds the others, and has to find those of before until these are in force.
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
                    raise TLSError(f"{owner!r} and {path!r} are both for {served!r}: one of them has to go")
                # That a name is the default's is found before a wildcard is.
                contexts.setdefault(served, None if name == first else made.context)
        assert default is not None  # it is one of the names
        _choose_by_name(default, before.names.find)
        return LoadedTLS(
            default, tuple(certificates), revocation, tuple(warnings), Reusable(before.names, kept), contexts
        )

    def _key(self, files: Files, path: str, text: str) -> _Key:
        """The private key of the certificate in this file, which holds this text; raises TLSError."""
        if "PRIVATE KEY-----" in text:
            return _Key(path, text)
        private_key = path.removesuffix(".pem") + ".key"
        if not files.exists(private_key):
            raise TLSError(f"no private key for {path!r}: it holds none, and there is no {private_key!r}")
        return _Key.read(files, private_key)

    def _make_checked(self, path: str, certificates: str, key: _Key, trust: _ClientTrust | None) -> Made:
        try:
            return self._make(path, certificates, key, trust)
        except TLSError:
            _check_certificates(certificates, path, "certificate")  # then it is not the key that is wrong
            raise

    def _names(self, files: Files) -> list[str]:
        return [name for name in files.names(self.directory) if name.endswith(".pem")]

    def files(self) -> tuple[str, ...]:
        """What `load` reads; the directory stands for what is in it."""
        return (self.directory, *self._policy_files())


_DEFAULT = "default.pem"


def _choose_by_name(default: Context, find: Callable[[str], Any]) -> None:
    """Have connections that begin with the default context go on with the one for the name that their client gives.

    References go from the default to the others and never back, so that all are freed without the garbage collector
    once nothing uses them: replaced contexts would wait for it, thousands of certificates and their keys.
    """
    if isinstance(default, ssl.SSLContext):
        default.sni_callback = _chooser(find)
    else:
        default.find_by_name(find)


def _find_no_other(context: Context) -> None:
    """Have a connection that has come to this context stay with it.

    A client of TLS 1.3 that is told to say hello again is asked for its name again, and then of the context that was
    chosen. Had that no callback, OpenSSL would call the default's, which nothing of Python's holds any more once a
    reload has replaced it: the process would crash. The second name has to be the first (RFC 8446, section 4.1.2).
    """
    if isinstance(context, ssl.SSLContext):
        context.sni_callback = _keep
    else:
        context.find_by_name(_find_nothing)


def _chooser(find: Callable[[str], ssl.SSLContext | None]) -> Callable[[Any, str | None, Any], None]:
    """A `sni_callback` that puts the name's context in the place of the default's."""

    def choose(connection: Any, name: str | None, context: object) -> None:
        chosen = None if name is None else find(name)
        if chosen is not None:
            connection.context = chosen

    return choose


def _keep(connection: object, name: str | None, context: object) -> None:
    """A `sni_callback` that leaves the context."""


def _find_nothing(name: str) -> None:
    return None


def _verify_clients(context: ssl.SSLContext, trust: _ClientTrust) -> None:
    """Let in clients alone that show a certificate of one of these authorities; resume none of their sessions."""
    context.load_verify_locations(cadata=trust.authorities)
    context.verify_mode = ssl.CERT_REQUIRED
    if trust.revoked is not None:
        with _named(trust.revoked) as file:
            context.load_verify_locations(cafile=file)  # cadata= takes certificates alone
        # Of each certificate in a chain, as nginx and HAProxy do: an authority may be revoked too.
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    context.num_tickets = 0  # TLS 1.3
    context.options |= ssl.OP_NO_TICKET
    with suppress(openssl.UnavailableError):  # see check_resumed, and tls_bounds
        openssl.disable_session_cache(context)
        openssl.set_max_certificate_bytes(context, MAX_CLIENT_CERTIFICATES)


def ignore_bad_names() -> None:
    """Have a client that asks for a name which is not ASCII, as RFC 6066, section 3, wants it, just be refused.

    `ssl` does that before it asks for a context, and has Python print a traceback, in which the client has a say.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, UnicodeDecodeError) and isinstance(unraisable.object, bytes)):
            before(unraisable)

    sys.unraisablehook = hook


def fingerprint(paths: Iterable[str]) -> tuple[object, ...]:
    """Something that compares as different once a file, or a certificate or key in a directory, is another.

    It asks os.stat alone. Missing files are no error. For `files()`, taken before `load`, so that what changes
    meanwhile is seen.
    """
    return finish(fingerprinting(paths))


def fingerprinting(paths: Iterable[str]) -> Steps[tuple[object, ...]]:
    """The same in steps, one for each file."""
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
                # The change time too: permissions that were wrong are set right without a new modification time.
                found.append((file, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns))
    return tuple(found)


def _entries(directory: str) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(_DIRECTORY_SUFFIXES) and not name.startswith(".")]


@dataclass(frozen=True)
class _Key:
    """A private key: PEM text, which may hold more, and the file that it was read from."""

    path: str
    text: str = field(repr=False)

    @classmethod
    def read(cls, files: Files, path: str) -> _Key:
        """Read it; raises TLSError."""
        return cls(path, files.read(path, "private key"))


def _load_pair(context: ssl.SSLContext, path: str, certificates: str, private_key: _Key) -> Certificate:
    def no_passphrase() -> str:  # without this, OpenSSL would ask on a terminal that a service may not have
        raise TLSError(f"the private key {private_key.path!r} is encrypted: give it without a passphrase")

    try:
        # `ssl` takes names of files alone, and the whole chain in one.
        with _named(certificates) as certificate_file, _named(private_key.text) as key_file:
            context.load_cert_chain(certificate_file, key_file, no_passphrase)
    except ssl.SSLError as error:
        # The third: a key of a kind for which there is no certificate at all.
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise TLSError(
                f"the private key {private_key.path!r} does not belong to the certificate {path!r}"
            ) from error
        if error.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            raise TLSError(f"the certificate {path!r} is too weak: {error.reason}") from error
        if error.reason == "INVALID_CERTIFICATE":  # one of its extensions
            raise TLSError(f"the certificate {path!r} is not one that OpenSSL takes: {error.reason}") from error
        raise TLSError(f"no usable private key in PEM form in {private_key.path!r}") from error
    except OSError as error:
        raise TLSError(f"no temporary file for the certificate {path!r}: {_reason(error)}") from error
    try:
        # The first is the server's.
        names, not_before, not_after = x509.describe(_PEM_CERTIFICATE.findall(certificates)[0])
    except ValueError as error:
        raise TLSError(f"the certificate {path!r} holds what cannot be read: {error}") from error
    return Certificate(path, names, not_before, not_after)


@contextmanager
def _named(text: str) -> Iterator[str]:
    """The name of a file with this text, which is in memory where it can be; raises OSError."""
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
    """The text of a PEM file that has at least one certificate in it, and none that cannot be read."""
    found = _pem_certificates(files.read(path, what), path, what)
    _check_certificates(found, path, what)
    return found


def _pem_certificates(text: str, path: str, what: str) -> str:
    """The certificates in a text that may hold more, one at least; raises TLSError."""
    found = _PEM_CERTIFICATE.findall(text)
    if not found or len(found) != text.count("-----BEGIN CERTIFICATE-----"):  # one of them does not end
        raise TLSError(f"no usable {what} in PEM form in {path!r}")
    return "\n".join(found)


def _check_certificates(found: str, path: str, what: str) -> None:
    """Raise TLSError for one that cannot be read. It takes half a millisecond."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=found)
    except (ssl.SSLError, ValueError, TypeError) as error:  # also a byte that is not ASCII
        raise TLSError(f"no usable {what} in PEM form in {path!r}") from error


def _digest(texts: Iterable[str]) -> bytes:
    """A digest that differs as soon as one of the texts does."""
    digest = sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return digest.digest()


def finish(steps: Steps[_Result]) -> _Result:
    """Take all steps, and give the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result


def _revocation_lists(files: Files, path: str) -> tuple[str, RevocationLists]:
    """The text of a PEM file that has at least one revocation list in it, and what it says; raises TLSError."""
    try:
        blocks = crl.pem_blocks(files.read(path, "revocation list"))
        text = "\n".join(blocks)
        described = crl.describe(path, blocks)
        with _named(text) as file:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=file)
    except (ssl.SSLError, ValueError) as error:
        raise TLSError(f"no usable revocation list in PEM form in {path!r}") from error
    except OSError as error:
        raise TLSError(f"no temporary file for the revocation list {path!r}: {_reason(error)}") from error
    return text, described


def _text(content: bytes) -> str:
    """The text of a PEM file, in which all but ASCII is a comment. Raises NotUTF8Error."""
    check_mark(content)
    content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return content.decode("ascii", "replace")


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _reason(error: OSError) -> str:
    return (error.strerror or "unknown error").lower()
