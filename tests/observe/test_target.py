"""The request target (RFC 9112, section 3.2): each form of it, and the hosts that are served."""

from __future__ import annotations

import pytest

from rtservice.observe.target import BadRequestError, is_served, read_target


@pytest.mark.parametrize(
    ("method", "target", "host", "found"),
    [
        ("GET", "/healthz", "localhost:9090", ("/healthz", "", "localhost")),
        ("GET", "/status.json?sort=age&limit=1", "LocalHost", ("/status.json", "sort=age&limit=1", "localhost")),
        ("GET", "http://a.example:1/x?y", "b.example", ("/x", "y", "a.example")),
        ("GET", "HTTPS://A.example", "b.example", ("/", "", "a.example")),
        ("GET", "http://a.example?x=1", "b.example", ("/", "x=1", "a.example")),
        ("OPTIONS", "http://a.example", "b.example", ("*", "", "a.example")),
        ("OPTIONS", "http://a.example/", "b.example", ("/", "", "a.example")),
        ("OPTIONS", "*", "[::1]:9090", ("*", "", "[::1]")),
        ("GET", "//x/y", "localhost", ("//x/y", "", "localhost")),
        ("GET", "/", " localhost:", ("/", "", "localhost")),
        ("GET", "/", "", ("/", "", "")),
    ],
)
def test_the_authority_of_an_absolute_target_replaces_the_host_header(method, target, host, found) -> None:
    read = read_target(method.encode(), target.encode(), b"HTTP/1.1", [host.encode()])
    assert (read.path.decode(), read.query.decode(), read.host) == found


@pytest.mark.parametrize(
    ("version", "hosts", "problem"),
    [
        (b"HTTP/1.1", [], "missing"),
        (b"HTTP/1.1", [b"localhost", b"localhost"], "more than one"),
        (b"HTTP/1.0", [b"a", b"b"], "more than one"),
        (b"HTTP/1.1", [b"a b"], "malformed"),
        (b"HTTP/1.1", [b"localhost:x"], "malformed"),
        (b"HTTP/1.1", [b"localhost, evil.example"], "malformed"),
        (b"HTTP/1.1", [b"user@localhost"], "malformed"),
        (b"HTTP/1.1", [b"http://localhost"], "malformed"),
        (b"HTTP/1.1", [b"\xff"], "malformed"),
        (b"HTTP/1.1", [b"[::1"], "malformed"),
    ],
)
def test_a_request_without_exactly_one_valid_host_is_rejected(version, hosts, problem) -> None:
    with pytest.raises(BadRequestError, match=problem):
        read_target(b"GET", b"/", version, hosts)
    with pytest.raises(BadRequestError, match=problem):
        read_target(b"GET", b"http://localhost/", version, hosts)


def test_http_1_0_requires_no_host_header() -> None:
    assert read_target(b"GET", b"/x", b"HTTP/1.0", []).host is None


@pytest.mark.parametrize(
    ("method", "target"),
    [
        (b"GET", b"*"),
        (b"GET", b"healthz"),
        (b"GET", b"localhost:80"),
        (b"GET", b"ftp://localhost/"),
        (b"GET", b"http:///x"),
        (b"GET", b"http://user@localhost/"),
        (b"GET", b"http://local%68ost/"),
        (b"OPTIONS", b"x"),
    ],
)
def test_an_invalid_request_target_is_rejected(method, target) -> None:
    with pytest.raises(BadRequestError):
        read_target(method, target, b"HTTP/1.1", [b"localhost"])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "192.0.2.1", "[::1]", "[2001:db8::1]", "localhost", "localhost.", "web-1"]
)
def test_addresses_localhost_and_configured_names_are_served(host: str) -> None:
    assert is_served(host, {"web-1"})


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "127.1", "0x7f000001", "[x]", "web-2"]
)
def test_other_host_names_are_not_served(host: str) -> None:
    assert not is_served(host, {"web-1"})
    assert is_served(host, {"*"})
