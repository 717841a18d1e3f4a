"""Client certificates: revocation, session resumption, and the limit on chain length."""

import os
import shutil
import ssl
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from rtservice.net import crl, openssl
from rtservice.net.groups import SSL_GROUPS
from rtservice.net.tls import (
    DirectoryTLS,
    Files,
    RecordedFiles,
    ServerTLS,
    TLSError,
    alpn_gate,
    check_resumed,
    fingerprint,
)
from rtservice.net.tls_bounds import MAX_CLIENT_CERTIFICATES
from rtservice.net.tls_memory import MemoryTLS
from tests.support.tls_libraries import LIBRARIES
from tests.support.tls_versions import VERSIONS

# The second is pyOpenSSL's only text.
REVOKED = r"(?i)certificate revoked|certificate verify failed'"


class PyOpenSSLEnd:
    """The server side of pyOpenSSL, with the interface of an SSLObject."""

    def __init__(self, context, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        from OpenSSL import SSL

        self.error = SSL.Error
        self.connection = SSL.Connection(context._context, None)
        self.connection.set_accept_state()
        self.incoming, self.outgoing = incoming, outgoing

    def _call(self, method) -> None:
        data = self.incoming.read()
        if data:
            self.connection.bio_write(data)
        try:
            method()
        except self.error as problem:
            failed = problem
        else:
            failed = None
        with suppress(self.error):
            while True:
                self.outgoing.write(self.connection.bio_read(1 << 16))
        if failed is not None and failed.args:
            raise ssl.SSLError(str(failed))

    def do_handshake(self) -> None:
        self._call(self.connection.do_handshake)

    def read(self, size: int) -> None:
        self._call(lambda: self.connection.recv(size))


def handshake(server, client: ssl.SSLContext, name: str | None = "localhost", session: ssl.SSLSession | None = None):
    """Perform a handshake in memory; return both ends, or raise the SSLError of the side that rejects it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
    if isinstance(server, ssl.SSLContext):
        far = server.wrap_bio(to_server, to_client, server_side=True)
    else:
        far = PyOpenSSLEnd(server, to_server, to_client)
    for _ in range(3):
        for end in (near, far):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    for end in (near, far):
        with suppress(ssl.SSLWantReadError):
            end.read(1)  # TLS 1.3 sends the session, or the rejection of the client, after the handshake
    return near, far


@pytest.fixture(scope="module")
def world(certificates):
    """The certificates, with `deep`, a client of the authority `inner`; and `revoke`, which makes revocation lists."""
    certificates.make("deep", "client", "inner")
    certificates.join("deep-chain.pem", "deep.pem", "inner.pem")
    certificates.join("both-ca.pem", "ca.pem", "other.pem")
    config = certificates["ca.cnf"]

    def revoke(file: str, authority: str, *names: str, last: str = "", following: str = "") -> str:
        """Return the path of a new revocation list of `authority` with these certificates."""
        index = certificates[f"{file}.index"]
        Path(index).write_text("")
        Path(config).write_text(f"[ca]\ndefault_ca=own\n[own]\ndatabase={index}\ndefault_md=sha256\n")
        common = ["ca", "-config", config, "-keyfile", certificates[f"{authority}.key"]]
        common += ["-cert", certificates[f"{authority}.pem"]]
        for name in names:
            certificates.openssl(*common, "-revoke", certificates[f"{name}.pem"])
        period = ["-crl_lastupdate", last, "-crl_nextupdate", following] if following else ["-crldays", "30"]
        certificates.openssl(*common, "-gencrl", *period, "-out", certificates[f"{file}.crl"])
        return certificates[f"{file}.crl"]

    certificates.revoke = revoke
    return certificates


@pytest.fixture
def load(world):
    def make(library: str = "ssl", **policy):
        if library == "pyopenssl":
            pytest.importorskip("OpenSSL")
        policy = {"client_ca": world["ca.pem"], "library": library, **policy}
        return ServerTLS(world["server.key"], world["server.pem"], **policy).load()

    return make


@pytest.fixture
def client(world):
    """Return a client context with a certificate, and its chain if there is one."""

    def make(name: str | None = "client", version: str = "TLSv1_3") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion[version]
        if name is not None:
            chain = world[f"{name}-chain.pem"]
            context.load_cert_chain(chain if os.path.exists(chain) else world[f"{name}.pem"], world[f"{name}.key"])
        return context

    return make


# --- sessions ---


@LIBRARIES
@VERSIONS
def test_no_session_with_a_client_certificate_is_resumed(load, client, library, version) -> None:
    context = load(library).context
    peer = client(version=version)
    first, _ = handshake(context, peer)
    if library == "ssl":  # pyOpenSSL sends sessions, but they cannot be resumed
        assert first.session is None or not first.session.has_ticket
    again, far = handshake(context, peer, session=first.session)
    assert not again.session_reused
    if library == "ssl":
        assert far.getpeercert()


@pytest.fixture
def two_names(world, tmp_path):
    """A directory with the default certificate and one for a.example."""
    world.make("a.example", "server", "ca", alternative="")
    for source, file in (("server", "default"), ("a.example", "a.example")):
        for suffix in ("pem", "key"):
            shutil.copy(world[f"{source}.{suffix}"], tmp_path / f"{file}.{suffix}")
    return str(tmp_path)


@LIBRARIES
@VERSIONS
def test_a_session_with_a_client_certificate_is_not_resumed_for_another_name(
    world, two_names, client, library, version
) -> None:
    if library == "pyopenssl":
        pytest.importorskip("OpenSSL")
    context = DirectoryTLS(two_names, client_ca=world["ca.pem"], library=library).load().context
    peer = client(version=version)
    for before, after in (("localhost", "a.example"), ("a.example", "localhost"), ("a.example", "a.example")):
        first, _ = handshake(context, peer, before)
        assert not handshake(context, peer, after, first.session)[0].session_reused


@VERSIONS
@pytest.mark.parametrize("access", [True, False])
@pytest.mark.parametrize("verified", [True, False])
def test_a_session_is_not_resumed_after_a_reload(
    world, two_names, client, version, access, verified, monkeypatch
) -> None:
    """A changed authority or revocation list also applies to old sessions: they are not resumed."""
    if not access:
        monkeypatch.setattr(openssl, "_outcome", lambda: "no reason")
        monkeypatch.setattr(SSL_GROUPS, "_proven", None)  # restores the verification result after the test
    peer = client(version=version)
    source = DirectoryTLS(two_names, client_ca=world["both-ca.pem"] if verified else None)
    changed = DirectoryTLS(two_names, client_ca=world["other.pem"] if verified else None)
    for name in ("localhost", "a.example"):
        before, after = source.load().context, source.load().context
        first, _ = handshake(before, peer, name)
        if not verified:  # otherwise this test would prove nothing
            assert handshake(before, peer, name, first.session)[0].session_reused
        assert not handshake(after, peer, name, first.session)[0].session_reused
        if verified:
            with pytest.raises(ssl.SSLError):
                handshake(changed.load().context, peer, name, first.session)


def not_after(world, name: str) -> float:
    return ssl.cert_time_to_seconds(str(ssl._ssl._test_decode_cert(world[f"{name}.pem"])["notAfter"]))


def test_without_access_to_openssl_a_resumed_session_expires_with_its_certificate(
    world, load, client, monkeypatch
) -> None:
    monkeypatch.setattr(openssl, "_outcome", lambda: "no reason")
    monkeypatch.setattr(SSL_GROUPS, "_proven", None)
    context = load().context
    for version in ("TLSv1_2", "TLSv1_3"):
        peer = client(version=version)
        first, far = handshake(context, peer)
        assert check_resumed(far, not_after(world, "client") + 1) is None  # verified in this handshake
        again, far = handshake(context, peer, session=first.session)
        assert again.session_reused == (version == "TLSv1_2")
        if version == "TLSv1_2":
            assert check_resumed(far) is None
            assert check_resumed(far, not_after(world, "client") - 1) is None
            assert check_resumed(far, not_after(world, "client") + 1) == "client certificate has expired"


@VERSIONS
def test_resumption_is_checked_for_foreign_contexts(world, client, version) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(world["server.pem"], world["server.key"])
    context.load_verify_locations(world["ca.pem"])
    context.verify_mode = ssl.CERT_OPTIONAL
    for name in ("client", None):
        peer = client(name, version)
        first, _ = handshake(context, peer)
        again, far = handshake(context, peer, session=first.session)
        assert again.session_reused
        assert check_resumed(far) is None
        assert (check_resumed(far, time.time() + 1e9) is not None) == (name is not None)


# --- revocation ---


@LIBRARIES
@VERSIONS
def test_only_revoked_clients_are_rejected(world, load, client, library, version) -> None:
    world.make("gone", "client", "ca")
    context = load(library, client_crl=world.revoke("one", "ca", "gone")).context
    handshake(context, client(version=version))
    with pytest.raises(ssl.SSLError, match=REVOKED):
        handshake(context, client("gone", version))


@LIBRARIES
@VERSIONS
def test_revocation_applies_to_each_name_of_a_directory(world, two_names, client, library, version) -> None:
    if library == "pyopenssl":
        pytest.importorskip("OpenSSL")
    world.make("gone", "client", "ca")
    list_ = world.revoke("each", "ca", "gone")
    context = DirectoryTLS(two_names, client_ca=world["ca.pem"], client_crl=list_, library=library).load().context
    for name in ("localhost", "a.example", None):
        handshake(context, client(version=version), name)
        with pytest.raises(ssl.SSLError, match=REVOKED):
            handshake(context, client("gone", version), name)


@LIBRARIES
def test_an_intermediate_authority_can_be_revoked(world, load, client, library) -> None:
    lists = [world.revoke("inner", "inner"), world.revoke("root", "ca"), world.revoke("root-less", "ca", "inner")]
    whole = world.join("whole.crl", "inner.crl", "root.crl")
    handshake(load(library, client_crl=whole).context, client("deep"))
    revoked = world.join("revoked.crl", "inner.crl", "root-less.crl")
    with pytest.raises(ssl.SSLError, match=REVOKED):
        handshake(load(library, client_crl=revoked).context, client("deep"))
    for only in lists[:2]:  # fail closed
        with pytest.raises(ssl.SSLError):
            handshake(load(library, client_crl=only).context, client("deep"))


@LIBRARIES
def test_a_client_is_rejected_without_a_revocation_list_of_its_authority(world, load, client, library) -> None:
    context = load(library, client_crl=world.revoke("other", "other")).context
    with pytest.raises(ssl.SSLError):
        handshake(context, client())


@LIBRARIES
def test_an_expired_revocation_list_rejects_every_client_and_reports_its_expiry(world, load, client, library) -> None:
    list_ = world.revoke("old", "ca", last="20200101000000Z", following="20200201000000Z")
    loaded = load(library, client_crl=list_)
    assert loaded.revocation == crl.RevocationLists(list_, 1, 1580515200)
    with pytest.raises(ssl.SSLError):
        handshake(loaded.context, client())


def test_the_earliest_expiry_of_several_revocation_lists_is_reported(world, load) -> None:
    world.revoke("far", "ca", last="20200101000000Z", following="20550201000000Z")  # a GeneralizedTime
    world.revoke("near", "other", last="20200101000000Z", following="20490201000000Z")  # the last of UTCTime
    loaded = load(client_crl=world.join("two.crl", "far.crl", "near.crl"))
    assert loaded.revocation == crl.RevocationLists(world["two.crl"], 2, 2495750400)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "junk",
        "-----BEGIN X509 CRL-----\nMIIB\n",
        "-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n",
        "-----BEGIN X509 CRL-----\n????\n-----END X509 CRL-----\n",
        "-----BEGIN X509 CRL-----\n-----END X509 CRL-----\n",
        None,
    ],
)
def test_a_file_without_a_usable_revocation_list_is_named(world, load, content, tmp_path) -> None:
    path = tmp_path / "bad.crl"
    path.write_text(Path(world["ca.pem"]).read_text() if content is None else content)
    with pytest.raises(TLSError) as caught:
        load(client_crl=str(path))
    assert str(caught.value) == f"no usable revocation list in PEM form in {str(path)!r}"
    path.unlink()
    with pytest.raises(TLSError, match="cannot read the revocation list"):
        load(client_crl=str(path))


def test_a_damaged_revocation_list_raises_only_value_error(world) -> None:
    (block,) = crl.pem_blocks(Path(world.revoke("cut", "ca", "client")).read_text())
    der = crl.base64.b64decode(block.split("-----")[2])
    for at in range(len(der)):
        for data in (der[:at], der[:at] + b"\xff" + der[at + 1 :], der[:at] + b"\x84" + der[at + 1 :]):
            with suppress(ValueError):
                crl._next_update(data)


def test_a_revocation_list_is_read_watched_and_recorded_with_the_other_files(world, tmp_path, client) -> None:
    world.make("gone", "client", "ca")
    path = tmp_path / "clients.crl"
    shutil.copy(world.revoke("watched", "ca", "gone"), path)
    source = ServerTLS(world["server.key"], world["server.pem"], client_ca=world["ca.pem"], client_crl=str(path))
    assert source.files()[-2:] == (world["ca.pem"], str(path))
    assert DirectoryTLS("/d", client_ca="/ca", client_crl="/crl").files() == ("/d", "/ca", "/crl")
    before = fingerprint(source.files())
    files = Files()
    loaded = source.load(files)
    path.unlink()
    assert fingerprint(source.files()) != before
    recorded = ServerTLS(**asdict(source)).load(RecordedFiles(files.texts, files.entries))
    assert recorded.revocation == loaded.revocation
    with pytest.raises(ssl.SSLError, match=REVOKED):
        handshake(recorded.context, client("gone"))


# --- chains ---


@VERSIONS
def test_a_too_long_chain_is_rejected_before_decoding(world, load, client, version) -> None:
    if openssl.unavailable() is not None:
        pytest.skip("contexts cannot be reached below ssl")
    context = load().context
    peer = client(version=version)
    length = len(ssl.PEM_cert_to_DER_cert(Path(world["inner.pem"]).read_text()))
    for count, accepted in (
        (MAX_CLIENT_CERTIFICATES // length - 3, True),
        (MAX_CLIENT_CERTIFICATES // length + 3, False),
    ):
        chain = world.join(f"{count}.pem", "client.pem", *["inner.pem"] * count)
        peer.load_cert_chain(chain, world["client.key"])
        if accepted:
            handshake(context, peer)
        else:
            with pytest.raises(ssl.SSLError, match=r"(?i)excessive message size"):
                handshake(context, peer)


# --- client names ---


def test_a_client_whose_name_is_not_utf8_is_served_without_a_name(world, client, tmp_path) -> None:
    config = tmp_path / "odd.cnf"
    config.write_bytes(
        b"[req]\ndistinguished_name=d\nx509_extensions=e\nprompt=no\n[d]\nCN=ok.example\n"
        b"[e]\nsubjectAltName=DNS:m\xfcller.example,DNS:ok.example\n"
    )
    made = ["-out", str(tmp_path / "odd.pem"), "-keyout", str(tmp_path / "odd.key")]
    world.openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3", "-config", str(config), *made)
    source = ServerTLS(world["server.key"], world["server.pem"], client_ca=str(tmp_path / "odd.pem"))
    peer = client(name=None)
    peer.load_cert_chain(tmp_path / "odd.pem", tmp_path / "odd.key")
    tls = MemoryTLS(source.load().context, server_side=True)
    tls.object = handshake(source.load().context, peer)[1]
    assert tls.peer_certificate == {"subject": ()}
    assert tls.object.getpeercert(binary_form=True)


# --- ALPN ---


def test_only_contexts_with_alpn_protocols_have_a_gate(world, two_names) -> None:
    assert alpn_gate(ServerTLS(world["server.key"], world["server.pem"]).load().context) is None
    assert alpn_gate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)) is None
    context = DirectoryTLS(two_names, alpn=("echo", "h2")).load().context
    assert context.alpn == (b"echo", b"h2")
    assert alpn_gate(context) is not alpn_gate(context)


@pytest.mark.parametrize("name", ["localhost", "a.example"])
@VERSIONS
def test_pyopenssl_answers_no_common_protocol_with_an_alert(two_names, client, name, version) -> None:
    pytest.importorskip("OpenSSL")
    context = DirectoryTLS(two_names, alpn=("echo",), library="pyopenssl").load().context
    peer = client(version=version)
    peer.set_alpn_protocols(["h2"])
    with pytest.raises(ssl.SSLError, match="no application protocol"):
        handshake(context, peer, name)
    peer.set_alpn_protocols(["h2", "echo"])
    assert handshake(context, peer, name)[0].selected_alpn_protocol() == "echo"
    assert handshake(context, client(version=version), name)[0].selected_alpn_protocol() is None
