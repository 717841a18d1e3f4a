"""A directory of certificates: SNI selects the certificate for each client."""

import gc
import os
import shutil
import ssl
import subprocess
import time
import weakref
from contextlib import suppress
from pathlib import Path

import pytest

from rtservice.net.tls import DirectoryTLS, TLSError
from rtservice.steps import finish
from tests.support.programs import program
from tests.support.tls_versions import VERSIONS

# Files and their alternative names; `cn.example` has none.
NAMES = {
    "a": "DNS:a.example,DNS:B.example,IP:127.0.0.1",
    "wild": "DNS:*.example.org,IP:127.0.0.1",
    "www": "DNS:www.example.org",
    "cn.example": "",
    "idn": "DNS:xn--bcher-kva.example",
    "fallback": "DNS:fallback.example",
    "again": "DNS:a.example",
}


@pytest.fixture(scope="module")
def named(certificates):
    """The certificates, including those of NAMES."""
    for name, alternative in NAMES.items():
        certificates.make(name, "server", "ca", alternative=alternative)
    return certificates


@pytest.fixture
def put(named, tmp_path):
    """Copy certificate NAME and its key into a directory, as FILE.pem and FILE.key."""
    (tmp_path / "certificates").mkdir()

    def copy(name: str, file: str = "") -> None:
        for suffix in ("pem", "key"):
            shutil.copy(named[f"{name}.{suffix}"], tmp_path / "certificates" / f"{file or name}.{suffix}")

    copy.directory = tmp_path / "certificates"
    return copy


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None, session=None):
    """Perform a handshake in memory; return both ends, or raise the SSLError of the side that rejects it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name, session=session),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(3):
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    for end in ends:
        with suppress(ssl.SSLWantReadError):
            end.read(1)  # TLS 1.3 sends the session, or the rejection of the client, after the handshake
    return ends


def unverifying_client(**attributes) -> ssl.SSLContext:
    """Return a client context that accepts any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in attributes.items():
        setattr(context, name, value)
    return context


def served_name(named, server: ssl.SSLContext, name: str | None) -> str:
    """Return which of NAMES a client that requests `name` receives."""
    end, _ = handshake(server, unverifying_client(), name)
    pem = ssl.DER_cert_to_PEM_cert(end.getpeercert(binary_form=True))
    (found,) = (file for file in NAMES if pem in Path(named[f"{file}.pem"]).read_text())
    return found


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.example", "a"),
        ("b.example", "a"),
        ("A.Example", "a"),
        ("www.example.org", "www"),
        ("mail.example.org", "wild"),
        ("MAIL.example.org", "wild"),
        ("a.example.", "a"),
        ("WWW.example.org.", "www"),
        ("mail.example.org.", "wild"),
        ("cn.example", "cn.example"),
        ("bücher.example", "idn"),
        # Unknown names select the default.
        ("example.org", "fallback"),
        ("x.mail.example.org", "fallback"),
        ("*.a.example", "fallback"),
        ("unknown", "fallback"),
        ("a", "fallback"),
        ("127.0.0.1", "fallback"),
        (None, "fallback"),
    ],
)
def test_sni_selects_the_certificate(named, put, name, file) -> None:
    for stem in ("a", "wild", "www", "cn.example", "idn"):
        put(stem)
    put("fallback", "default")
    assert served_name(named, DirectoryTLS(str(put.directory)).load().context, name) == file


def test_the_first_file_is_the_default_without_default_pem(named, put) -> None:
    put("www", "2")
    put("a", "10")
    context = DirectoryTLS(str(put.directory)).load().context
    assert [served_name(named, context, name) for name in (None, "unknown", "www.example.org")] == ["a", "a", "www"]


def test_a_name_shared_with_the_default_selects_the_other_certificate(named, put) -> None:
    put("a")
    put("again", "default")
    put("www")
    context = DirectoryTLS(str(put.directory)).load().context
    assert [served_name(named, context, name) for name in (None, "a.example", "b.example")] == ["again", "a", "a"]


def test_the_default_may_be_a_link_to_another_file(named, put) -> None:
    put("a")
    put("www")
    for suffix in ("pem", "key"):
        (put.directory / f"default.{suffix}").symlink_to(f"www.{suffix}")
    context = DirectoryTLS(str(put.directory)).load().context
    assert [served_name(named, context, name) for name in (None, "a.example", "www.example.org")] == ["www", "a", "www"]


def test_two_files_with_the_same_name_are_both_reported(put) -> None:
    put("a")
    put("again")
    assert error_of(put.directory) == (
        f"'{put.directory}/a.pem' and '{put.directory}/again.pem' are both for 'a.example'; remove one of them"
    )


def test_a_file_may_hold_the_chain_and_the_key(named, put) -> None:
    named.make("deep", "server", "inner", alternative="DNS:deep.example")
    shutil.copy(named.join("all.pem", "deep.key", "deep.pem", "inner.pem"), put.directory)
    put("a")
    client = ssl.create_default_context(cafile=named["ca.pem"])
    end, _ = handshake(DirectoryTLS(str(put.directory)).load().context, client, "deep.example")
    assert end.getpeercert()["subjectAltName"] == (("DNS", "deep.example"),)


def test_other_extensions_and_hidden_files_are_ignored(named, put) -> None:
    put("a")
    for name in ("README", "a.pem.bak", ".b.pem", ".pem", "other.key"):
        (put.directory / name).write_text("junk")
    assert [certificate.path for certificate in DirectoryTLS(str(put.directory)).load().certificates] == [
        f"{put.directory}/a.pem"
    ]


def test_names_and_expiry_of_each_certificate_are_reported(named, put) -> None:
    put("a")
    put("cn.example", "default")
    put("wild")
    found = DirectoryTLS(str(put.directory)).load().certificates
    assert [(Path(certificate.path).name, certificate.names) for certificate in found] == [
        ("a.pem", ("a.example", "b.example")),
        ("wild.pem", ("*.example.org",)),
        ("default.pem", ("cn.example",)),
    ]
    for certificate in found:
        text = subprocess.check_output(["openssl", "x509", "-in", certificate.path, "-noout", "-dates"], text=True)
        dates = dict(line.split("=") for line in text.splitlines())
        assert certificate.not_before == ssl.cert_time_to_seconds(dates["notBefore"]) <= time.time()
        assert certificate.not_after == ssl.cert_time_to_seconds(dates["notAfter"])
        assert certificate.not_after - certificate.not_before == 90 * 86400


# --- errors ---


def error_of(directory: object, **policy) -> str:
    with pytest.raises(TLSError) as caught:
        DirectoryTLS(str(directory), **policy).load()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


def test_a_path_that_is_missing_empty_or_no_directory_is_named(tmp_path) -> None:
    assert error_of(tmp_path / "none") == f"cannot read the directory '{tmp_path}/none': no such file or directory"
    assert error_of(tmp_path) == f"no certificate in the directory '{tmp_path}'; add a file NAME.pem"
    (tmp_path / "file").touch()
    assert error_of(tmp_path / "file") == f"cannot read the directory '{tmp_path}/file': not a directory"


def test_a_certificate_without_a_key_is_named(put) -> None:
    put("a")
    put("www")
    (put.directory / "www.key").unlink()
    path = f"{put.directory}/www"
    assert error_of(put.directory) == f"no private key for '{path}.pem'; add the key to it, or as '{path}.key'"


def test_a_key_of_another_certificate_is_named(named, put) -> None:
    put("a")
    put("www")
    shutil.copy(named["a.key"], put.directory / "www.key")
    path = f"{put.directory}/www"
    assert error_of(put.directory) == f"the private key '{path}.key' does not belong to the certificate '{path}.pem'"


@pytest.mark.parametrize("content", ["", "junk", "-----BEGIN CERTIFICATE-----\n"])
def test_a_file_without_a_usable_certificate_is_named_and_not_skipped(put, content) -> None:
    put("a")
    (put.directory / "b.pem").write_text(content)
    (put.directory / "b.key").touch()
    assert error_of(put.directory) == f"no usable certificate in PEM form in '{put.directory}/b.pem'"


def test_an_unreadable_file_is_named(put) -> None:
    put("a")
    (put.directory / "b.pem").symlink_to("gone.pem")
    assert error_of(put.directory) == f"cannot read the certificate '{put.directory}/b.pem': no such file or directory"


# --- one policy for all names ---


@pytest.fixture
def two_names(put):
    """A directory with the default certificate and one for `a.example`."""
    put("a")
    put("fallback", "default")
    return str(put.directory)


EACH = pytest.mark.parametrize("name", ["a.example", "unknown", None])


@EACH
def test_alpn_follows_the_servers_preference_for_each_name(two_names, name) -> None:
    client = unverifying_client()
    client.set_alpn_protocols(["two", "one"])
    ends = handshake(DirectoryTLS(two_names, alpn=("one", "two")).load().context, client, name)
    assert [end.selected_alpn_protocol() for end in ends] == ["one", "one"]


@EACH
def test_the_minimum_version_applies_to_each_name(two_names, name) -> None:
    context = DirectoryTLS(two_names, minimum="1.3").load().context
    assert handshake(context, unverifying_client(), name)[0].version() == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        handshake(context, unverifying_client(maximum_version=ssl.TLSVersion.TLSv1_2), name)


@EACH
def test_the_cipher_suites_are_the_same_for_each_name(two_names, name) -> None:
    context = DirectoryTLS(two_names).load().context
    client = unverifying_client(maximum_version=ssl.TLSVersion.TLSv1_2)
    client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE+AESGCM")
    assert handshake(context, client, name)[0].cipher()[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
    client.set_ciphers("ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA")
    with pytest.raises(ssl.SSLError):
        handshake(context, client, name)


@EACH
@VERSIONS
def test_a_client_certificate_is_required_for_each_name(named, two_names, name, version) -> None:
    context = DirectoryTLS(two_names, client_ca=named["ca.pem"]).load().context

    def client(*names: str) -> ssl.SSLContext:
        made = unverifying_client(maximum_version=ssl.TLSVersion[version])
        for client_name in names:
            made.load_cert_chain(named[f"{client_name}.pem"], named[f"{client_name}.key"])
        return made

    _, far = handshake(context, client("client"), name)
    assert (("commonName", "client"),) in far.getpeercert()["subject"]
    for names in ([], ["stranger"]):
        with pytest.raises(ssl.SSLError):
            handshake(context, client(*names), name)


@EACH
@VERSIONS
def test_a_session_is_resumed_for_each_name(named, two_names, name, version) -> None:
    context = DirectoryTLS(two_names).load().context
    client = unverifying_client(maximum_version=ssl.TLSVersion[version])
    first, _ = handshake(context, client, name)
    assert handshake(context, client, name, first.session)[0].session_reused


def test_a_reload_between_two_client_hellos_is_safe(two_names) -> None:
    # In a separate process, since a bug would crash it: freed memory is overwritten immediately.
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    done = subprocess.run(
        program("reload_between_hellos", two_names), env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "TLSv1.3 TLS_AES_256_GCM_SHA384\n"


def test_a_reload_between_two_client_hellos_is_safe_with_pyopenssl(two_names) -> None:
    pytest.importorskip("OpenSSL")
    # In a separate process, since a bug would crash it: freed memory is overwritten immediately.
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    done = subprocess.run(
        program("reload_between_hellos_pyopenssl", two_names),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "TLSv1.3 TLS_AES_256_GCM_SHA384\n"


@pytest.mark.parametrize("library", ["ssl", "pyopenssl"])
def test_contexts_are_freed_without_the_garbage_collector(put, library) -> None:
    if library == "pyopenssl":
        pytest.importorskip("OpenSSL")
    for name in ("a", "wild", "www"):
        put(name)
    put("again", "default")
    before = {id(value) for value in gc.get_objects()}  # other tests may keep contexts
    loaded = DirectoryTLS(str(put.directory), library=library).load()
    kind = type(loaded.context)
    gc.collect()
    gc.disable()
    try:
        kept = [weakref.ref(value) for value in gc.get_objects() if isinstance(value, kind) and id(value) not in before]
        assert len(kept) >= 3
        mine = [reference for reference in kept if reference() is loaded.context]
        del loaded
        assert mine[0]() is None
        assert not [reference for reference in kept if reference() is not None]
    finally:
        gc.enable()


def test_a_connection_with_a_replaced_default_keeps_no_other_context_in_memory(named, put) -> None:
    put("a")
    put("www")
    put("fallback", "default")
    source = DirectoryTLS(str(put.directory))
    first = source.load()
    client = handshake(first.context, unverifying_client(), None)
    others = [weakref.ref(made.context) for made in first.reusable.made.values()]
    put("again", "a")  # another certificate for the same name
    second = finish(source.loading(None, first.reusable))
    assert served_name(named, first.context, "a.example") == "a"  # the first reload changes nothing
    second.take_effect()
    before, first = first.context, None
    assert [reference() is None for reference in others] == [True, False]
    # A client that connected before and sends its server name now receives the current certificate.
    assert served_name(named, before, "a.example") == served_name(named, second.context, "a.example") == "again"
    assert served_name(named, before, "www.example.org") == "www"
    assert served_name(named, before, None) == "fallback"
    assert client[1].version() == "TLSv1.3"


def test_contexts_are_freed_after_connections_that_used_them(two_names) -> None:
    context = DirectoryTLS(two_names).load().context
    gc.collect()
    gc.disable()
    try:
        ends = [handshake(context, unverifying_client(), name) for name in ("a.example", "unknown")]
        used = [weakref.ref(far.context) for _, far in ends]
        assert used[0]() is not used[1]()
        del context
        assert all(reference() is not None for reference in used)  # a connection keeps its context
        ends.clear()
        assert [reference() for reference in used] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "name", [b"a..example", b"a.example..", b"." * 9, b"-_x%y'z\x1b\r\n", b"x" * 60, b"xn--a-\x7f"]
)
def test_an_invalid_host_name_selects_the_default(two_names, name, capfd) -> None:
    context = DirectoryTLS(two_names).load().context
    stand_in = b"n" * len(name)
    to_server, to_client, altered = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
    near = unverifying_client().wrap_bio(to_client, to_server, server_hostname=stand_in.decode())
    with suppress(ssl.SSLWantReadError):
        near.do_handshake()
    hello = to_server.read()
    assert stand_in in hello
    altered.write(hello.replace(stand_in, name))
    far = context.wrap_bio(altered, to_client, server_side=True)
    with suppress(ssl.SSLWantReadError):
        far.do_handshake()
    assert far.context is context
    assert to_client.pending
    assert capfd.readouterr() == ("", "")


# --- a real service and a real client ---


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl (Debian: openssl) is not installed")
def test_s_client_sees_the_certificate_of_its_name_and_a_certificate_request(named, two_names, service) -> None:
    running = service(
        f"--listen=ssl:0:interface=127.0.0.1:certificates={two_names}:clientCA={named['ca.pem']}:alpn=echo"
    )

    def client(*arguments: str) -> str:
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{running.port}", "-CAfile", named["ca.pem"], *arguments],
            input="Q\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout + done.stderr

    mine = ("-cert", named["client.pem"], "-key", named["client.key"])
    for name, asked in (
        ("a.example", ("-servername", "a.example")),
        ("fallback.example", ("-servername", "unknown")),
        ("fallback.example", ("-noservername",)),
    ):
        seen = client(*asked, "-verify_hostname", name, "-verify_return_error", "-alpn", "echo", *mine)
        assert "Verify return code: 0 (ok)" in seen
        assert "ALPN protocol: echo" in seen
        assert "handshake failure" in client(*asked, "-tls1_2")
