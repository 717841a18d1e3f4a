"""TLS key exchange is limited to X25519, P-256, P-384 and hybrids of them; the log has a warning where that fails."""

import os
import shutil
import ssl
import subprocess
import sys
from contextlib import suppress

import pytest

from rtservice.net import groups, openssl
from rtservice.net.groups import GROUP_LISTS, SSL_GROUPS, client_hello
from rtservice.net.tls import DirectoryTLS, ServerTLS
from tests.support.programs import PROGRAMS, program
from tests.support.tls_libraries import LIBRARIES

# Group numbers (RFC 8446, section 4.2.7) and a public key.
X25519, P256, P384, P521, X448 = 29, 23, 24, 25, 30
FFDHE = {2048: 256, 3072: 257, 4096: 258, 6144: 259, 8192: 260}
SHARE = X25519, b"\x09" + bytes(31)


@pytest.fixture
def load(certificates):
    """Load a context; return it with its warnings."""

    def make(library: str = "ssl", name: str = "server", **policy):
        if library == "pyopenssl":
            pytest.importorskip("OpenSSL")
        loaded = ServerTLS(certificates[f"{name}.key"], certificates[f"{name}.pem"], library=library, **policy).load()
        return loaded.context, loaded.warnings

    return make


@pytest.fixture(autouse=True)
def _clear_verification(monkeypatch) -> None:
    """Clear the verification result of other tests."""
    monkeypatch.setattr(SSL_GROUPS, "_proven", None)


def answer_of(context, hello: bytes) -> bytes:
    """Return the answer of a context to a ClientHello."""
    if isinstance(context, ssl.SSLContext):
        return groups._answer(context, hello)
    from rtservice.net import pyopenssl

    return pyopenssl._answer(context._context, hello)


def accepts(context, group: int) -> bool:
    """Return whether a context accepts a client that supports only this group."""
    hello = client_hello([group])  # no key share yet: the answer is a HelloRetryRequest
    return answer_of(context, hello)[:1] == b"\x16"


@LIBRARIES
@pytest.mark.parametrize("name", ["server", "rsa"])
def test_only_the_three_inexpensive_groups_are_accepted(load, library, name) -> None:
    context, warnings = load(library, name)
    assert warnings == ()
    assert [accepts(context, group) for group in (X25519, P256, P384)] == [True] * 3
    assert [accepts(context, group) for group in (X448, P521, *FFDHE.values())] == [False] * 7


def test_openssl_accepts_all_groups_without_the_limit(certificates) -> None:
    """Otherwise the test above would prove nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates["server.pem"], certificates["server.key"])
    assert all(accepts(context, group) for group in (X25519, P256, P384, X448, P521, *FFDHE.values()))


def test_an_ml_kem_hybrid_is_preferred_if_openssl_supports_it(load) -> None:
    context, _ = load("pyopenssl")
    hybrid = 0x11EC
    retry = answer_of(context, client_hello([X25519, hybrid], SHARE))
    assert retry[:1] == b"\x16"
    from OpenSSL import SSL

    if SSL.OpenSSL_version(SSL.OPENSSL_VERSION).split()[1] < b"3.5":
        pytest.skip("this OpenSSL has no ML-KEM")
    # A HelloRetryRequest, whose key_share extension is the number of a group.
    assert b"\x00\x33\x00\x02" + hybrid.to_bytes(2) in retry


def test_every_context_of_a_directory_is_limited(certificates, tmp_path) -> None:
    for name in ("server", "rsa", "leaf"):
        for suffix in ("pem", "key"):
            shutil.copy(certificates[f"{name}.{suffix}"], tmp_path / f"{name}.{suffix}")
    certificates.make("other.example", "server", "ca", alternative="")
    for suffix in ("pem", "key"):
        shutil.copy(certificates[f"other.example.{suffix}"], tmp_path / f"default.{suffix}")
        for name in ("rsa", "leaf"):  # they have the same name as `server`
            (tmp_path / f"{name}.{suffix}").unlink()
    loaded = DirectoryTLS(str(tmp_path)).load()
    assert loaded.warnings == ()
    seen = []
    for name in ("localhost", None):
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        near = client.wrap_bio(to_client, to_server, server_hostname=name)
        far = loaded.context.wrap_bio(to_server, to_client, server_side=True)
        for end in (near, far):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
        seen.append(far.context)
    assert seen[0] is not seen[1]
    for context in seen:
        assert not accepts(context, FFDHE[2048])
        assert accepts(context, X25519)


# --- fallbacks ---


def test_without_access_to_openssl_groups_are_limited_to_p256_with_a_warning(load, monkeypatch) -> None:
    def unavailable(*_: object) -> bool:
        raise openssl.UnavailableError("no reason")

    monkeypatch.setattr(openssl, "set_groups", unavailable)
    monkeypatch.setattr(openssl, "unavailable", lambda: "no reason")
    monkeypatch.setattr(SSL_GROUPS, "full", (groups._below_ssl,))  # Python 3.15 has another method
    for _ in range(2):
        context, warnings = load()
        (line,) = warnings
        assert line.startswith("TLS key exchange is limited to P-256, without X25519: no reason; ")
        assert accepts(context, P256)
        assert not any(accepts(context, group) for group in (X25519, P384, X448, P521, *FFDHE.values()))


def test_without_the_pyopenssl_function_groups_are_limited_to_p256_with_a_warning(load, monkeypatch) -> None:
    pytest.importorskip("OpenSSL")
    from rtservice.net import pyopenssl

    monkeypatch.setattr(pyopenssl._GROUPS, "_proven", None)
    monkeypatch.setattr(pyopenssl._GROUPS, "full", (lambda context: False,))
    context, (line,) = load("pyopenssl")
    assert line.startswith("TLS key exchange is limited to P-256, without X25519: this version of pyOpenSSL")
    assert accepts(context, P256)
    assert not any(accepts(context, group) for group in (X25519, P384, X448, P521, *FFDHE.values()))


def test_a_method_that_does_not_limit_the_groups_falls_back_to_p256(load, monkeypatch) -> None:
    monkeypatch.setattr(SSL_GROUPS, "full", (lambda context: True,))
    context, (line,) = load()
    assert "is limited to P-256" in line
    assert not accepts(context, FFDHE[2048])


def test_a_warning_is_logged_if_no_method_limits_the_groups(load, monkeypatch) -> None:
    monkeypatch.setattr(SSL_GROUPS, "full", ())
    monkeypatch.setattr(SSL_GROUPS, "fallback", lambda context: True)
    _, (line,) = load()
    assert line.startswith("TLS key exchange is not proven to be limited")


def test_the_group_limit_is_verified_once_per_process(load, monkeypatch) -> None:
    answers = []
    answer = SSL_GROUPS.answer
    monkeypatch.setattr(SSL_GROUPS, "answer", lambda context, hello: answers.append(1) or answer(context, hello))
    for _ in range(3):
        load()
    assert len(answers) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        "sys.implementation.name = 'pypy'",
        "del ssl._ssl.__file__",
        "sys.modules['ctypes'] = None",
        "ssl._ssl.__file__ = '/no/such/file.so'",
        "ssl._ssl.__file__ = sys.modules['_ctypes'].__file__",
        "ssl.OPENSSL_VERSION_NUMBER += 1",
    ],
)
def test_a_wrong_assumption_about_the_interpreter_falls_back_to_p256(certificates, spoil) -> None:
    """In a separate process, since the check runs once per process."""
    command = program("load_spoiled", certificates["server.key"], certificates["server.pem"], spoil)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True TLS key exchange is limited to P-256, without X25519\n"


def test_an_unexpected_context_layout_is_detected(certificates) -> None:
    """The program simulates contexts with another memory layout."""
    done = subprocess.run(program("shift_contexts"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "another layout" in done.stdout


def test_a_rejected_group_list_leaves_no_error_in_the_openssl_queue(load) -> None:
    context, _ = load()
    assert openssl.unavailable() is None
    assert not openssl.set_groups(context, "bogus")
    assert accepts(context, X25519)
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True).do_handshake()


def test_every_openssl_supports_the_last_group_list() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert openssl.set_groups(context, GROUP_LISTS[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
def test_group_limits_work_with_memory_deny_write_execute(certificates) -> None:
    loads = str(PROGRAMS / "load_confined.py"), certificates["server.key"], certificates["server.pem"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program("confine", *loads), capture_output=True, text=True, timeout=60, env=environment)
    if done.stdout == "cannot be confined\n":
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None ()\n"


# --- another client ---


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl (Debian: openssl) is not installed")
@LIBRARIES
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_s_client_can_use_only_the_accepted_groups(service, certificates, library, version) -> None:
    if library == "pyopenssl":
        pytest.importorskip("OpenSSL")
    # An RSA certificate: in TLS 1.2 a client's groups also restrict ECDSA certificates (RFC 8422, section 5.1).
    files = f"privateKey={certificates['rsa.key']}:certKey={certificates['rsa.pem']}"
    running = service(f"--listen=ssl:0:interface=127.0.0.1:{files}:library={library}")

    def served(group: str) -> bool:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{running.port}", version, "-groups", group]
        command += ["-CAfile", certificates["ca.pem"], "-verify_return_error"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        return "Verify return code: 0 (ok)" in done.stdout and done.returncode == 0

    for group in ("X25519", "P-256", "P-384", "X448:P-384", "ffdhe8192:X25519"):
        assert served(group), group
    for group in ("X448", "P-521", *(f"ffdhe{bits}" for bits in FFDHE)):
        assert not served(group), group
    assert running.stop() == 0
    assert not [line for line in running.lines if "TLS key exchange" in line]
