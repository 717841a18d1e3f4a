"""Certificates, keys and revocation lists in the encodings of common editors; others are rejected by file name."""

import subprocess
from pathlib import Path

import pytest

from rtservice.net.description import ListenError
from rtservice.net.listen_types import check_description

FILES = (
    "privateKey={0}/key.pem:certKey={0}/cert.pem:extraCertChain={0}/chain.pem:clientCA={0}/ca.pem"
    ":clientCRL={0}/list.crl"
)


@pytest.fixture
def pem(tmp_path, certificates) -> Path:
    """A directory with one file of each kind."""
    for name, source in (("key", "server.key"), ("cert", "server.pem"), ("chain", "inner.pem"), ("ca", "ca.pem")):
        (tmp_path / f"{name}.pem").write_text(Path(certificates[source]).read_text())
    (tmp_path / "index.txt").write_text("")
    (tmp_path / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=x\n[x]\ndatabase={tmp_path}/index.txt\ndefault_md=sha256\ndefault_crl_days=30\n"
    )
    command = ["openssl", "ca", "-config", f"{tmp_path}/ca.cnf", "-gencrl", "-out", f"{tmp_path}/list.crl"]
    subprocess.run(
        [*command, "-keyfile", certificates["ca.key"], "-cert", certificates["ca.pem"]],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return tmp_path


@pytest.mark.parametrize("name", ["key.pem", "cert.pem", "chain.pem", "ca.pem", "list.crl"])
def test_byte_order_marks_line_endings_and_comments_are_accepted_and_other_encodings_named(pem, name) -> None:
    text = (pem / name).read_text()
    for content in (
        text.encode("utf-8-sig"),
        text.replace("\n", "\r\n").encode("utf-8-sig"),
        text.replace("\n", "\r").encode(),
        "Schlüssel\n".encode("latin-1") + text.encode(),
    ):
        (pem / name).write_bytes(content)
        check_description(f"ssl:0:{FILES.format(pem)}")
    for encoding, said in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
        (pem / name).write_bytes(text.encode(encoding))
        with pytest.raises(ListenError) as caught:
            check_description(f"ssl:0:{FILES.format(pem)}")
        assert f"'{pem}/{name}' is {said} by its byte order mark; save it as UTF-8" in str(caught.value)


def test_a_certificate_in_a_directory_may_have_a_byte_order_mark(pem, certificates) -> None:
    (pem / "d").mkdir()
    for name in ("server.pem", "server.key"):
        (pem / "d" / name).write_bytes(Path(certificates[name]).read_text().encode("utf-8-sig"))
    check_description(f"ssl:0:certificates={pem}/d")
