"""Renewed certificates are loaded, and adopted if all are valid."""

import pathlib
import shutil
import ssl

import pytest

from rtservice.net.description import ListenError
from rtservice.net.listener import Listener
from tests.support.listeners import PLAIN, facts, handshake


@pytest.fixture
def renewable(open_secure, certificates, tmp_path):
    """A listener with separate certificate files, as (certificate path, key path, Listener)."""
    paths = tmp_path / "x.pem", tmp_path / "x.key"
    put(certificates, "server", *paths)
    return *paths, open_secure(f"ssl:0:privateKey={paths[1]}:certKey={paths[0]}:interface=127.0.0.1")


def put(certificates, name: str, certificate: pathlib.Path, key: pathlib.Path) -> None:
    for suffix, path in (("pem", certificate), ("key", key)):
        shutil.copy(certificates[f"{name}.{suffix}"], path)


def test_clients_see_a_renewed_certificate_after_adopt(renewable, certificates) -> None:
    certificate, key, listener = renewable
    before = facts(listener)
    assert [loaded.path for loaded in listener.certificates] == [str(certificate)]
    assert sorted(listener.tls_files()) == sorted([str(certificate), str(key)])
    put(certificates, "rsa", certificate, key)
    loaded = listener.renew()
    assert loaded is not None
    assert facts(listener) == before
    listener.adopt(loaded)
    assert facts(listener) == (loaded.context, loaded.certificates)
    assert listener.tls is not before[0]
    old = {"maximum_version": ssl.TLSVersion.TLSv1_2}
    assert handshake(listener, certificates, **old)["version"] == "TLSv1.2"


@pytest.mark.parametrize("wrong", ["gone", "junk", "of another"])
def test_an_invalid_renewed_certificate_is_named_and_the_current_one_stays(renewable, certificates, wrong) -> None:
    certificate, _, listener = renewable
    before = facts(listener)
    if wrong == "gone":
        certificate.unlink()
    elif wrong == "junk":
        certificate.write_text("junk")
    else:
        shutil.copy(certificates["rsa.pem"], certificate)
    with pytest.raises(ListenError) as caught:
        listener.renew()
    assert repr(str(certificate)) in str(caught.value)
    assert facts(listener) == before
    assert handshake(listener, certificates) == PLAIN


def test_renewal_picks_up_added_and_removed_files(open_secure, certificates, tmp_path) -> None:
    def names(listener: Listener) -> list[str]:
        return [name for loaded in listener.certificates for name in loaded.names]

    for name in ("one", "two", "three"):
        certificates.make(name, "server", "ca", alternative=f"DNS:{name}.example")
    for name in ("one", "two"):
        put(certificates, name, tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
    listener = open_secure(f"ssl:0:interface=127.0.0.1:certificates={tmp_path}")
    assert names(listener) == ["one.example", "two.example"]
    assert listener.tls_files() == (str(tmp_path),)
    put(certificates, "three", tmp_path / "three.pem", tmp_path / "three.key")
    (tmp_path / "one.pem").unlink()
    listener.adopt(listener.renew())
    assert names(listener) == ["three.example", "two.example"]


def test_paths_are_resolved_once(open_secure, certificates, tmp_path, monkeypatch) -> None:
    put(certificates, "server", tmp_path / "x.pem", tmp_path / "x.key")
    monkeypatch.chdir(tmp_path)
    listener = open_secure("ssl:0:privateKey=x.key:certKey=x.pem:interface=127.0.0.1")
    monkeypatch.chdir("/")
    assert listener.renew() is not None
