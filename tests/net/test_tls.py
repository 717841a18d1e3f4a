"""From files to an `ssl` context: each error is one line that names the file."""

import base64
import os
import shutil
import ssl
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rtservice.net.tls import DirectoryTLS, Files, RecordedFiles, ServerTLS, TLSError, fingerprint

FILES = ("private_key", "certificate", "chain", "client_ca")


@pytest.fixture
def good(certificates) -> dict[str, str]:
    """Matching key, certificate, chain and CA files."""
    names = ("leaf.key", "leaf.pem", "inner.pem", "ca.pem")
    return {field: certificates[name] for field, name in zip(FILES, names, strict=True)}


def error_of(**arguments) -> str:
    with pytest.raises(TLSError) as caught:
        ServerTLS(**arguments).load()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


@contextmanager
def as_unprivileged_user():
    """Run the test without root, which can read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Perform a handshake in memory; raise the SSLError of the side that rejects it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(3):  # three flights complete a handshake of either version
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    for end in ends:
        with suppress(ssl.SSLWantReadError):
            end.read(1)  # a TLS 1.3 client receives the rejection of its certificate here
    return ends[0], ends[1]


def trusting(certificates, **attributes) -> ssl.SSLContext:
    """Return a client context that trusts the root and checks the name."""
    context = ssl.create_default_context(cafile=certificates["ca.pem"])
    for name, value in attributes.items():
        setattr(context, name, value)
    return context


@pytest.mark.parametrize("field", FILES)
def test_a_missing_file_is_named(good, field) -> None:
    path = "/no/such/file.pem"
    assert f"{path!r}: no such file or directory" in error_of(**{**good, field: path})


@pytest.mark.parametrize("field", FILES)
def test_a_directory_is_named(good, field, tmp_path) -> None:
    assert f"{str(tmp_path)!r}: is a directory" in error_of(**{**good, field: str(tmp_path)})


@pytest.mark.parametrize("field", FILES)
def test_an_unreadable_file_is_named(good, field, tmp_path) -> None:
    closed = tmp_path / "closed.pem"
    closed.write_text(Path(good[field]).read_text())
    closed.chmod(0)
    # User 65534 cannot reach the other files either: the tested file is opened first, or alone.
    given = {**{name: str(closed) for name in ("private_key", "certificate")}, field: str(closed)}
    with as_unprivileged_user():
        assert f"{str(closed)!r}: permission denied" in error_of(**given)


JUNK = {
    "empty": b"",
    "text": b"certainly no certificate\n",
    "binary": bytes(range(256)) * 8,
    "not base64": b"-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----\n",
    "not ASN.1": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "no end": b"-----BEGIN CERTIFICATE-----\nMIIB\n",
    "junk in a key's place": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
}


@pytest.mark.parametrize(
    ("field", "junk"),
    [
        pytest.param(
            field,
            junk,
        )
        for field in FILES
        for junk in JUNK
    ],
)
def test_a_file_with_invalid_content_is_named(good, field, junk, tmp_path) -> None:
    path = tmp_path / "junk.pem"
    path.write_bytes(JUNK[junk])
    assert repr(str(path)) in error_of(**{**good, field: str(path)})


@pytest.mark.parametrize("field", ["certificate", "chain", "client_ca"])
@pytest.mark.parametrize(
    "cut", [lambda text: text[: len(text) // 2], lambda text: text[:40]], ids=["in the middle", "in the second line"]
)
def test_a_file_with_a_truncated_second_certificate_is_named(good, certificates, field, cut, tmp_path) -> None:
    path = tmp_path / "cut.pem"
    text = Path(certificates["ca.pem"]).read_text()
    path.write_text(Path(good[field]).read_text() + cut(text))
    assert repr(str(path)) in error_of(**{**good, field: str(path)})


@pytest.mark.parametrize("other", ["server.key", "rsa.key"])
def test_a_key_of_another_certificate_is_named_with_both_files(certificates, other) -> None:
    line = error_of(private_key=certificates[other], certificate=certificates["client.pem"])
    assert f"private key {certificates[other]!r} does not belong to" in line
    assert repr(certificates["client.pem"]) in line


def test_an_encrypted_key_is_named_without_a_passphrase_prompt(certificates, tmp_path) -> None:
    path = str(tmp_path / "encrypted.key")
    certificates.openssl("pkey", "-in", certificates["server.key"], "-aes256", "-passout", "pass:x", "-out", path)
    line = error_of(private_key=path, certificate=certificates["server.pem"])
    assert "encrypted" in line
    assert repr(path) in line


def test_a_certificate_where_the_key_should_be_is_named(certificates) -> None:
    path = certificates["server.pem"]
    assert f"private key in PEM form in {path!r}" in error_of(private_key=path, certificate=path)


def test_a_key_where_the_certificate_should_be_is_named(certificates) -> None:
    path = certificates["server.key"]
    assert f"certificate in PEM form in {path!r}" in error_of(private_key=path, certificate=path)


def test_a_too_short_key_is_named(certificates) -> None:
    certificates.make("weak", "server", "ca", newkey=("rsa:1024",))
    line = error_of(private_key=certificates["weak.key"], certificate=certificates["weak.pem"])
    assert repr(certificates["weak.pem"]) in line
    assert "weak" in line


def test_error_messages_contain_no_key_material(certificates, tmp_path) -> None:
    secret = Path(certificates["server.key"]).read_text()
    path = tmp_path / "bad.key"
    path.write_text(secret.replace("\n", "\nA", 1))
    line = error_of(private_key=str(path), certificate=certificates["server.pem"])
    assert not any(part in line for part in secret.splitlines()[1:-1])


def test_one_file_may_hold_key_certificate_and_chain(certificates) -> None:
    path = certificates.join("all.pem", "leaf.key", "leaf.pem", "inner.pem")
    context = ServerTLS(private_key=path, certificate=path).load().context
    assert handshake(context, trusting(certificates))[0].version() == "TLSv1.3"


def test_the_chain_is_sent(certificates) -> None:
    key, certificate = certificates["leaf.key"], certificates["leaf.pem"]
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(ServerTLS(key, certificate).load().context, trusting(certificates))
    handshake(ServerTLS(key, certificate, certificates["inner.pem"]).load().context, trusting(certificates))


def test_text_around_certificates_is_ignored(certificates, tmp_path) -> None:
    path = tmp_path / "with-text.pem"
    text = Path(certificates["server.pem"]).read_text()
    path.write_text(f"Subject: CN = zoë\n{text}\nthat was it\n", encoding="utf-8")
    context = ServerTLS(certificates["server.key"], str(path)).load().context
    assert handshake(context, trusting(certificates))[0].version() == "TLSv1.3"


def test_crlf_line_endings_are_accepted(certificates, tmp_path) -> None:
    paths = []
    for name in ("server.key", "server.pem"):
        (tmp_path / name).write_bytes(Path(certificates[name]).read_bytes().replace(b"\n", b"\r\n"))
        paths.append(str(tmp_path / name))
    assert handshake(ServerTLS(*paths).load().context, trusting(certificates))[0].version() == "TLSv1.3"


@pytest.mark.parametrize("name", ["server", "rsa"])
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_both_versions_work_with_ecdsa_and_rsa(certificates, name, version) -> None:
    context = ServerTLS(certificates[f"{name}.key"], certificates[f"{name}.pem"]).load().context
    client, _ = handshake(context, trusting(certificates, maximum_version=ssl.TLSVersion[version]))
    assert client.version() == version.replace("_", ".")


def test_minimum_version_1_3_rejects_1_2(certificates) -> None:
    context = ServerTLS(certificates["server.key"], certificates["server.pem"], minimum="1.3").load().context
    assert handshake(context, trusting(certificates))[0].version() == "TLSv1.3"
    with pytest.raises(ssl.SSLError) as caught:
        handshake(context, trusting(certificates, maximum_version=ssl.TLSVersion.TLSv1_2))
    assert caught.value.reason in ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_versions_below_1_2_are_rejected(certificates) -> None:
    context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
    client = trusting(certificates, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        handshake(context, client)


def test_every_suite_has_forward_secrecy_and_authenticated_encryption(certificates) -> None:
    context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
    offered = context.get_ciphers()
    assert offered
    for cipher in offered:
        assert cipher["aead"], cipher
        assert cipher["protocol"] == "TLSv1.3" or cipher["kea"] == "kx-ecdhe", cipher


def test_the_server_chooses_the_cipher_unless_the_client_prefers_chacha(certificates) -> None:
    context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
    for first, chosen in (
        ("ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-CHACHA20-POLY1305"),
        ("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ):
        client = trusting(certificates, maximum_version=ssl.TLSVersion.TLSv1_2)
        client.set_ciphers(f"{first}:ECDHE+AESGCM:ECDHE+CHACHA20")
        assert handshake(context, client)[0].cipher()[0] == chosen


def test_alpn_follows_the_servers_preference(certificates) -> None:
    context = ServerTLS(certificates["server.key"], certificates["server.pem"], alpn=("one", "two")).load().context
    client = trusting(certificates)
    client.set_alpn_protocols(["two", "one"])
    assert [end.selected_alpn_protocol() for end in handshake(context, client)] == ["one", "one"]
    assert [end.selected_alpn_protocol() for end in handshake(context, trusting(certificates))] == [None, None]


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_client_ca_requires_a_certificate_from_each_client(certificates, version) -> None:
    context = (
        ServerTLS(certificates["server.key"], certificates["server.pem"], client_ca=certificates["ca.pem"])
        .load()
        .context
    )

    def client(*names: str) -> ssl.SSLContext:
        made = trusting(certificates, maximum_version=ssl.TLSVersion[version])
        for name in names:
            made.load_cert_chain(certificates[f"{name}.pem"], certificates[f"{name}.key"])
        return made

    _, server_end = handshake(context, client("client"))
    assert (("commonName", "client"),) in server_end.getpeercert()["subject"]
    for names in ([], ["stranger"]):
        with pytest.raises(ssl.SSLError):
            handshake(context, client(*names))


def test_no_client_certificate_is_requested_without_a_client_ca(certificates) -> None:
    context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
    client = trusting(certificates)
    client.load_cert_chain(certificates["client.pem"], certificates["client.key"])
    _, server_end = handshake(context, client)
    assert server_end.getpeercert() is None or server_end.getpeercert() == {}


def test_a_context_keeps_its_certificate_when_the_file_changes(certificates, tmp_path) -> None:
    for name in ("server.key", "server.pem"):
        (tmp_path / name).write_bytes(Path(certificates[name]).read_bytes())
    context = ServerTLS(str(tmp_path / "server.key"), str(tmp_path / "server.pem")).load().context
    for name in ("server.key", "server.pem"):
        (tmp_path / name).write_text("")
    assert handshake(context, trusting(certificates))[0].version() == "TLSv1.3"


def altered(certificates, path: Path, old: bytes, new: bytes) -> str:
    """Write the server's certificate with replaced bytes, which only its signature would reveal; return its path."""
    der = ssl.PEM_cert_to_DER_cert(Path(certificates["server.pem"]).read_text())
    body = base64.encodebytes(der.replace(old, new)).decode()
    path.write_text(f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n")
    return str(path)


def test_an_expired_certificate_is_served_with_its_expiry_date(certificates, tmp_path) -> None:
    der = ssl.PEM_cert_to_DER_cert(Path(certificates["server.pem"]).read_text())
    dates = der[der.index(b"\x17\x0d") :][:30]  # two of UTCTime, RFC 5280, section 4.1.2.5
    path = altered(certificates, tmp_path / "old.pem", dates, b"\x17\x0d010203040506Z\x17\x0d020304050607Z")
    loaded = ServerTLS(certificates["server.key"], path).load()
    (found,) = loaded.certificates
    assert (found.path, found.names) == (path, ("localhost",))
    assert (found.not_before, found.not_after) == (981173106, 1015218367)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(loaded.context, trusting(certificates))


@pytest.mark.parametrize("new", [b"\x17\x0d01x203040506Z", b"\x17\x0d019903040506Z"])
def test_a_certificate_with_an_invalid_date_is_named(certificates, tmp_path, new) -> None:
    der = ssl.PEM_cert_to_DER_cert(Path(certificates["server.pem"]).read_text())
    path = altered(certificates, tmp_path / "odd.pem", der[der.index(b"\x17\x0d") :][:15], new)
    assert repr(path) in error_of(private_key=certificates["server.key"], certificate=path)


def test_files_lists_the_files_to_read(good) -> None:
    assert sorted(ServerTLS(**good).files()) == sorted(good.values())
    assert ServerTLS("key", "certificate").files() == ("key", "certificate")
    assert DirectoryTLS("/d").files() == ("/d",)
    assert DirectoryTLS("/d", client_ca="/ca").files() == ("/d", "/ca")


# --- fingerprints ---


def test_a_fingerprint_is_stable_while_nothing_changes(good, tmp_path) -> None:
    (tmp_path / "a.pem").write_text("a")
    paths = (*good.values(), str(tmp_path), "/no/such/file")
    assert fingerprint(paths) == fingerprint(paths)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("longer than it was"),
        replace,
        lambda path: os.utime(path, (1, 1)),
        Path.unlink,
        lambda path: path.chmod(0o600),
    ],
    ids=["written", "replaced", "touched", "removed", "chmod"],
)
@pytest.mark.parametrize("suffix", [".pem", ".key"])
def test_a_fingerprint_changes_with_a_file(tmp_path, change, inside, suffix) -> None:
    path = (tmp_path / "a").with_suffix(suffix)
    path.write_text("a")
    path.chmod(0o644)
    paths = [str(tmp_path if inside else path)]
    before = fingerprint(paths)
    change(path)
    assert fingerprint(paths) != before


@pytest.mark.parametrize("inside", [False, True])
def test_a_fingerprint_changes_with_the_target_of_a_link(tmp_path, inside) -> None:
    for name in "12":
        (tmp_path / name).write_text(name)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "a.pem"
    link.symlink_to(tmp_path / "1")
    paths = [str(link.parent if inside else link)]
    before = fingerprint(paths)
    link.unlink()
    link.symlink_to(tmp_path / "2")
    assert fingerprint(paths) != before


def test_a_fingerprint_changes_when_a_missing_file_appears(tmp_path) -> None:
    paths = [str(tmp_path / "d"), str(tmp_path / "f.pem")]
    seen = [fingerprint(paths)]
    (tmp_path / "d").mkdir()
    seen.append(fingerprint(paths))
    (tmp_path / "d" / "a.pem").touch()
    seen.append(fingerprint(paths))
    (tmp_path / "f.pem").touch()
    seen.append(fingerprint(paths))
    assert len(set(seen)) == 4


def test_other_files_of_a_directory_do_not_change_its_fingerprint(tmp_path) -> None:
    before = fingerprint([str(tmp_path)])
    for name in ("README", ".hidden.pem", "a.pem.new"):
        (tmp_path / name).touch()
    assert fingerprint([str(tmp_path)]) == before


def served(context: ssl.SSLContext, client_ca: str) -> bytes:
    """Return the certificate that a client receives, in DER."""
    client = ssl.create_default_context(cafile=client_ca)
    return handshake(context, client)[0].getpeercert(binary_form=True)


def test_recorded_files_load_without_the_file_system(good, tmp_path) -> None:
    copies = {field: str(shutil.copy(path, tmp_path)) for field, path in good.items()}
    source = ServerTLS(**copies)
    files = Files()
    before = source.load(files)
    for path in copies.values():
        os.unlink(path)
    after = source.load(RecordedFiles(files.texts, files.entries))
    assert after.certificates == before.certificates
    assert after.context.verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(TLSError):
        source.load()


def test_a_recorded_certificate_is_served_as_the_original(certificates) -> None:
    source = ServerTLS(private_key=certificates["server.key"], certificate=certificates["server.pem"])
    files = Files()
    read = source.load(files).context
    recorded = source.load(RecordedFiles(files.texts, files.entries)).context
    ca = certificates["ca.pem"]
    assert served(recorded, ca) == served(read, ca)


def test_a_recorded_directory_loads_the_same_certificates(certificates, tmp_path) -> None:
    directory = tmp_path / "certificates"
    directory.mkdir()
    shutil.copy(certificates["server.pem"], directory / "one.pem")
    shutil.copy(certificates["server.key"], directory / "one.key")
    (directory / "default.pem").write_text(Path(certificates.join("both.pem", "rsa.pem", "rsa.key")).read_text())
    (directory / "notes.txt").write_text("not read")
    source = DirectoryTLS(str(directory))
    files = Files()
    before = source.load(files)
    shutil.rmtree(directory)
    after = source.load(RecordedFiles(files.texts, files.entries))
    assert [certificate.path for certificate in after.certificates] == [
        f"{directory}/one.pem",
        f"{directory}/default.pem",
    ]
    assert after.certificates == before.certificates
    assert served(after.context, certificates["ca.pem"]) == served(before.context, certificates["ca.pem"])
    assert not any(path.endswith(".txt") for path in files.texts)


def test_a_key_that_was_missing_when_recorded_is_reported_again(certificates, tmp_path) -> None:
    shutil.copy(certificates["server.pem"], tmp_path / "one.pem")
    source = DirectoryTLS(str(tmp_path))
    files = Files()
    with pytest.raises(TLSError, match="no private key for"):
        source.load(files)
    with pytest.raises(TLSError, match="no private key for"):
        source.load(RecordedFiles(files.texts, files.entries))
