"""Certificates with unusual names and dates are served if OpenSSL accepts them."""

import re
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rtservice.escaping import escaped
from rtservice.net.der import time as der_time
from rtservice.net.listener import Listener
from rtservice.net.tls import DirectoryTLS, ServerTLS, TLSError
from rtservice.process.certificates import certificates_of, logging_certificates
from rtservice.steps import finish
from tests.support.odd_certificates import common_name, dns, odd_certificate, tlv

OTHER_NAME = tlv(0xA0, b"\x06\x03\x2a\x03\x04", tlv(0xA0, tlv(0x0C, b"me")))
DIRECTORY_NAME = tlv(0xA4, common_name(0x0C, b"somebody"))
ADDRESS = tlv(0x87, bytes((127, 0, 0, 1)))
MANY = [f"n{number}.example" for number in range(1000)]
EMAIL, URI = tlv(0x81, b"m\xfcller@example"), tlv(0x86, b"https://m\xfcller.example/")
OTHERS = (OTHER_NAME, DIRECTORY_NAME, EMAIL, URI, ADDRESS)
NOW = (b"\x17\x0d240101000000Z", b"\x18\x0f99991231235959Z")

# The replaced fields of a certificate; its names; and the names that a client can request.
ODD: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str]]] = {
    "Latin-1": ({"alternative": dns(b"m\xfcller", b"ok")}, ("müller", "ok"), ["ok"]),
    "UTF-8": ({"alternative": dns("müller".encode(), b"ok")}, ("müller", "ok"), ["ok"]),
    "neither": ({"alternative": dns(b"\xff\xfe\xc3", b"ok")}, ("ÿþÃ", "ok"), ["ok"]),
    "a NUL": ({"alternative": dns(b"ok.example\0.evil.example")}, ("ok.example\0.evil.example",), []),
    "control characters": ({"alternative": dns(b"a\x1b[2J\r\n.example", b"a b")}, ("a\x1b[2j\r\n.example", "a b"), []),
    "empty names": ({"alternative": dns(b"", b".", b"..", b"ok")}, (".", "..", "ok"), ["ok"]),
    "upper case and a dot": ({"alternative": dns(b"OK.A.", b"ok.a")}, ("ok.a.", "ok.a"), ["ok.a"]),
    "a letter that becomes ASCII": ({"alternative": dns("\u212a.example".encode())}, ("\u212a.example",), []),
    "an A-label": ({"alternative": dns(b"XN--Bcher-KVA")}, ("xn--bcher-kva",), ["xn--bcher-kva"]),
    "stars": ({"alternative": dns(b"*", b"*.", b"*.example")}, ("*", "*.", "*.example"), ["*", "*.example"]),
    "an address alone": ({"alternative": tlv(0x30, ADDRESS)}, (), []),
    "another name alone": ({"alternative": tlv(0x30, OTHER_NAME)}, (), []),
    "a directory's name alone": ({"alternative": tlv(0x30, DIRECTORY_NAME)}, (), []),
    "mail and URI": ({"alternative": tlv(0x30, EMAIL, URI)}, (), []),
    "all kinds": ({"alternative": tlv(0x30, *OTHERS, tlv(0x82, b"ok"), tlv(0x88, b"\x2a\x03"))}, ("ok",), ["ok"]),
    "critical": ({"alternative": dns(b"ok"), "critical": True}, ("ok",), ["ok"]),
    "no names": ({"alternative": tlv(0x30)}, ("localhost",), ["localhost"]),
    "1,000 names": ({"alternative": dns(*map(str.encode, MANY))}, tuple(MANY), MANY),
    "a common name of UTF-8": ({"subject": common_name(0x0C, "Zoë".encode())}, ("Zoë",), []),
    "a common name of Latin-1": ({"subject": common_name(0x14, b"Zo\xeb")}, ("Zoë",), []),
    "a common name of UTF-16": ({"subject": common_name(0x1E, "Zoë".encode("utf-16-be"))}, ("Zoë",), []),
    "a common name of UTF-32": ({"subject": common_name(0x1C, "ok".encode("utf-32-be"))}, ("ok",), ["ok"]),
    "a common name with a NUL": ({"subject": common_name(0x0C, b"ok\0evil")}, ("ok\0evil",), []),
    "a subject not marked as constructed": (
        {"subject": b"\x10" + common_name(0x0C, b"ok")[1:]}, ("ok",), ["ok"]
    ),
    "no common name": ({"subject": tlv(0x30)}, (), []),
    "a negative serial number": ({"alternative": dns(b"ok"), "serial": b"\x80"}, ("ok",), ["ok"]),
    "a serial number of 0": ({"alternative": dns(b"ok"), "serial": b"\0"}, ("ok",), ["ok"]),
    "a serial number of 64 bytes": ({"alternative": dns(b"ok"), "serial": b"\x7f" * 64}, ("ok",), ["ok"]),
    "no expiry": ({"alternative": dns(b"ok"), "dates": b"".join(NOW)}, ("ok",), ["ok"]),
    "after 2049": ({"alternative": dns(b"ok"), "dates": NOW[0] + b"\x18\x0f20500101000000Z"}, ("ok",), ["ok"]),
    "without seconds": ({"alternative": dns(b"ok"), "dates": b"\x17\x0b2401010000Z" + NOW[1]}, ("ok",), ["ok"]),
    "an offset": ({"alternative": dns(b"ok"), "dates": b"\x17\x11240101000000+0100" + NOW[1]}, ("ok",), ["ok"]),
    "expired": ({"alternative": dns(b"ok"), "dates": b"\x17\x0d010203040506Z\x17\x0d020304050607Z"}, ("ok",), ["ok"]),
}  # fmt: skip


def served_der(server: ssl.SSLContext, name: str | None) -> bytes:
    """Return the certificate that a client receives, in DER."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=name)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for end in (near, far) * 3:  # with a HelloRetryRequest
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    found = near.getpeercert(binary_form=True)
    assert found is not None
    return found


class Log:
    """Records the logged lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def emit(self, level: object, text: str, **fields: object) -> None:
        self.lines.append(text.format(**fields))


@pytest.mark.parametrize("odd", ODD)
def test_an_unusual_certificate_is_served_alone_and_by_its_names(certificates, tmp_path, odd) -> None:
    exchanged, names, served = ODD[odd]
    pem = odd_certificate(certificates["server.pem"], **exchanged)
    der = ssl.PEM_cert_to_DER_cert(pem)
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "odd.pem").write_text(pem + Path(certificates["server.key"]).read_text())
    default = odd_certificate(certificates["server.pem"], alternative=dns(b"default.example"))
    (tmp_path / "all" / "default.pem").write_text(default + Path(certificates["server.key"]).read_text())

    alone = ServerTLS(certificates["server.key"], str(tmp_path / "all" / "odd.pem")).load()
    assert alone.certificates[0].names == names
    assert list(alone.certificates[0].served) == served
    assert served_der(alone.context, "localhost") == der

    among = DirectoryTLS(str(tmp_path / "all")).load()
    assert [certificate.names for certificate in among.certificates] == [names, ("default.example",)]
    for name in served[:5]:
        assert served_der(among.context, name.replace("*.", "any.")) == der
    for name in ("unknown.org", "localhos", None):
        assert served_der(among.context, name) == ssl.PEM_cert_to_DER_cert(default)

    log = Log()
    listener = Listener(None, "ssl", certificates=among.certificates)  # type: ignore[arg-type]  # it is not used
    finish(logging_certificates(log, [listener]))
    (line,) = [line for line in log.lines if "/odd.pem" in line]
    assert line.isprintable()
    assert len(line) < 1000
    (row,) = [row for row in certificates_of([listener]) if "odd.pem" in row["path"]]
    for text in (line, row["names"]):
        assert escaped(", ".join(names[:5])) in text
        assert ("and 995 more" in text) is (len(names) == 1000)


@pytest.mark.parametrize("odd", ["Latin-1", "a NUL", "a common name of UTF-16", "no expiry"])
def test_an_unusual_certificate_is_served_with_pyopenssl(certificates, tmp_path, odd) -> None:
    pytest.importorskip("OpenSSL")
    exchanged, names, _ = ODD[odd]
    (tmp_path / "odd.pem").write_text(odd_certificate(certificates["server.pem"], **exchanged))
    loaded = ServerTLS(certificates["server.key"], str(tmp_path / "odd.pem"), library="pyopenssl").load()
    assert loaded.certificates[0].names == names


@pytest.mark.parametrize(
    "junk",
    [
        {"alternative": b"\x30\x84\xff"},
        {"alternative": tlv(0x30, tlv(0x82, b"ok"), b"\x82\x7f")},
        {"alternative": b"junk"},
        {"subject": common_name(0x1E, b"\0Z\xd8")},
        {"serial": b"\xff\x80"},
    ],
)
def test_a_certificate_that_openssl_rejects_is_named(certificates, tmp_path, junk) -> None:
    path = tmp_path / "odd.pem"
    path.write_text(odd_certificate(certificates["server.pem"], **junk))
    with pytest.raises(TLSError, match=f"certificate.* {re.escape(repr(str(path)))}"):
        ServerTLS(certificates["server.key"], str(path)).load()


def test_a_very_long_name_is_truncated_in_the_error(certificates, tmp_path) -> None:
    (tmp_path / "odd.pem").write_text(odd_certificate(certificates["server.pem"], alternative=dns(b"n" * 10_000)))
    log = Log()
    found = ServerTLS(certificates["server.key"], str(tmp_path / "odd.pem")).load().certificates
    listener = Listener(None, "ssl", certificates=found)  # type: ignore[arg-type]  # it is not used
    finish(logging_certificates(log, [listener]))
    assert "n" * 200 in log.lines[0]
    assert len(log.lines[0]) < 1000


def test_equal_names_that_no_client_can_request_do_not_conflict(certificates, tmp_path) -> None:
    key = Path(certificates["server.key"]).read_text()
    for number in range(3):
        pem = odd_certificate(certificates["server.pem"], alternative=dns(b"m\xfcller.example", b"a b"))
        (tmp_path / f"{number}.pem").write_text(pem + key)
    assert len(DirectoryTLS(str(tmp_path)).load().certificates) == 3


def test_names_that_differ_in_case_or_a_final_dot_conflict(certificates, tmp_path) -> None:
    key = Path(certificates["server.key"]).read_text()
    for number, name in enumerate((b"ok.example", b"OK.example.")):
        (tmp_path / f"{number}.pem").write_text(
            odd_certificate(certificates["server.pem"], alternative=dns(name)) + key
        )
    with pytest.raises(TLSError, match=re.escape("are both for 'ok.example'; remove one of them")):
        DirectoryTLS(str(tmp_path)).load()


def test_file_names_may_contain_upper_case_and_control_characters(certificates, tmp_path) -> None:
    key = Path(certificates["server.key"]).read_text()
    for number, name in enumerate(("UPPER.example..pem", "a\x1b\nb.pem", "\udcff.pem")):
        made = odd_certificate(certificates["server.pem"], alternative=dns(b"n%d.example" % number))
        (tmp_path / name).write_text(made + key)
    found = DirectoryTLS(str(tmp_path)).load().certificates
    listener = Listener(None, "ssl", certificates=found)  # type: ignore[arg-type]  # it is not used
    log = Log()
    finish(logging_certificates(log, [listener]))
    assert len(log.lines) == 3
    for text in (*log.lines, *(row["path"] for row in certificates_of([listener]))):
        assert text.isprintable()
        text.encode()


def test_names_and_dates_equal_those_of_openssl(certificates) -> None:
    for name in ("server", "rsa", "leaf", "client", "ca"):
        path = certificates[f"{name}.pem"]
        (found,) = ServerTLS(certificates[f"{name}.key"], path).load().certificates
        said = subprocess.check_output(["openssl", "x509", "-in", path, "-noout", "-dates"], text=True)
        dates = [ssl.cert_time_to_seconds(line.partition("=")[2]) for line in said.splitlines()]
        assert [found.not_before, found.not_after] == dates
        assert found.names == (name if name in ("client", "ca") else "localhost",)


@pytest.mark.parametrize(
    ("kind", "text", "seconds"),
    [
        (0x17, b"491231235959Z", 2524607999),
        (0x17, b"500101000000Z", -631152000),
        (0x18, b"20500101000000Z", 2524608000),
        (0x18, b"99991231235959Z", 253402300799),
        (0x17, b"700101000000Z", 0),
        (0x17, b"7001010000Z", 0),
        (0x17, b"700101000000+0100", -3600),
        (0x17, b"700101000000-0030", 1800),
    ],
)
def test_a_time_is_parsed_as_in_rfc_5280(kind, text, seconds) -> None:
    assert der_time(kind, text) == seconds


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((0x17, text) for text in (b"", b"Z", b"701301000000Z", b"700001000000Z", b"700101 00000Z", b"70010100000Z")),
        *((0x17, text) for text in (b"700101000000", b"700101000000z", b"700101000000Z ", b"\xff" * 13)),
        *((0x18, text) for text in (b"", b"500101000000Z", b"-0500101000000Z", b"20500230000000Z")),
        (0x04, b"700101000000Z"),
    ],
)  # fmt: skip
def test_an_invalid_time_is_rejected(kind, text) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the text is never shown
        der_time(kind, text)


def test_a_file_with_an_unreadable_chain_certificate_is_named_in_a_directory(certificates, tmp_path) -> None:
    junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    parts = [Path(certificates[name]).read_text() for name in ("server.pem", "server.key")]
    (tmp_path / "a.pem").write_text(parts[0] + junk + parts[1])
    with pytest.raises(TLSError, match="no usable certificate in PEM form"):
        DirectoryTLS(str(tmp_path)).load()
