"""The grammar of descriptions: a text has exactly one meaning, or is rejected with one line that says what to write."""

import contextlib
import random
import re

import pytest

from rtservice.net.description import (
    ListenError,
    address_name,
    bare_host,
    parse,
    tcp_name,
    unix_name,
    unknown_type,
)


def read(text: str) -> tuple[object, ...]:
    found = parse(text)
    return (*found.prefixes, found.kind), found.positional, found.keywords


def tcp(port: str, interface: str | None = None, *types: str, **keywords: str) -> tuple[object, ...]:
    """Return the parts of a TCP description with this port and interface."""
    return types or ("tcp",), (port,), {**({} if interface is None else {"interface": interface}), **keywords}


V6 = "2001:db8::1"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # Only a port.
        ("8080", tcp("8080")),
        ("tcp:8080", tcp("8080")),
        (":8080", tcp("8080")),
        ("tcp::8080", tcp("8080")),
        ("proxy:8080", tcp("8080", None, "proxy", "tcp")),
        ("proxy::8080", tcp("8080", None, "proxy", "tcp")),
        ("8080:backlog=5", tcp("8080", backlog="5")),
        ("8080:interface=::1:backlog=5", tcp("8080", "::1", backlog="5")),
        # HOST:PORT, as users and the log write it.
        ("localhost:8080", tcp("8080", "localhost")),
        ("127.0.0.1:8080", tcp("8080", "127.0.0.1")),
        ("*:8080", tcp("8080", "*")),
        ("status.example.com:8080", tcp("8080", "status.example.com")),
        ("web-1.5g:8080", tcp("8080", "web-1.5g")),
        ("[::1]:8080", tcp("8080", "::1")),
        ("[fe80::1%eth0.100]:8080:backlog=5", tcp("8080", "fe80::1%eth0.100", backlog="5")),
        (r"[\:\:1]:8080", tcp("8080", "::1")),
        ("tcp:0.0.0.0:8080", tcp("8080", "0.0.0.0")),
        ("tcp:[::1]:8080", tcp("8080", "::1")),
        ("tcp:web:8080", tcp("8080", "web")),
        ("tcp:5g:8080", tcp("8080", "5g")),
        ("tcp:tcp:8080", tcp("8080", "tcp")),
        ("tcp:backlog=5:[::1]:8080", tcp("8080", "::1", backlog="5")),
        ("tcp:[::1]:port=8080", (("tcp",), (), {"port": "8080", "interface": "::1"})),
        ("tcp6:[::]:8080", tcp("8080", "::", "tcp6")),
        ("ssl:127.0.0.1:8443:certificates=/d", tcp("8443", "127.0.0.1", "ssl", certificates="/d")),
        ("ssl:[::1]:8443:privateKey=k", tcp("8443", "::1", "ssl", privateKey="k")),
        ("ssl:tcp:[::1]:8443:privateKey=k", tcp("8443", "::1", "ssl", "tcp", privateKey="k")),
        ("proxy:[::1]:8080", tcp("8080", "::1", "proxy", "tcp")),
        ("proxy:tcp:127.0.0.1:8080", tcp("8080", "127.0.0.1", "proxy", "tcp")),
        ("haproxy:ssl:tcp:localhost:8080", tcp("8080", "localhost", "haproxy", "ssl", "tcp")),
        # Bare and bracketed IPv6 addresses as interface.
        ("tcp6:8080:interface=::1", tcp("8080", "::1", "tcp6")),
        ("tcp6:8080:interface=[::1]", tcp("8080", "::1", "tcp6")),
        (r"tcp6:8080:interface=\:\:1", tcp("8080", "::1", "tcp6")),
        (r"tcp6:8080:interface=[\:\:1]", tcp("8080", "::1", "tcp6")),
        ("tcp6:8080:interface=::", tcp("8080", "::", "tcp6")),
        ("tcp:8080:interface=fe80::1%eth0", tcp("8080", "fe80::1%eth0")),
        ("tcp:8080:interface=fe80::1%2:backlog=5", tcp("8080", "fe80::1%2", backlog="5")),
        ("tcp:8080:interface=::ffff:192.0.2.1:backlog=5", tcp("8080", "::ffff:192.0.2.1", backlog="5")),
        ("tcp:8080:interface=1:2:3:4:5:6:7:8", tcp("8080", "1:2:3:4:5:6:7:8")),
        ("tcp6:backlog=5:interface=::1:port=1", (("tcp6",), (), {"backlog": "5", "interface": "::1", "port": "1"})),
        ("tcp6:8080:interface=[::1]:backlog=5", tcp("8080", "::1", "tcp6", backlog="5")),
        ("tcp6:interface=[::1]:8080", tcp("8080", "::1", "tcp6")),
        ("tcp6:interface=::1:port=8080", (("tcp6",), (), {"interface": "::1", "port": "8080"})),
        # The address extends to the next key=value field, even if that changes it.
        ("tcp6:8080:interface=::1:50", tcp("8080", "::1:50", "tcp6")),
        ("tcp6:interface=::1:8080", (("tcp6",), (), {"interface": "::1:8080"})),
        ("tcp6:8080:::1", (("tcp6",), ("8080", "::1"), {})),
        ("tcp6:8080:::1:backlog=5", (("tcp6",), ("8080", "::1"), {"backlog": "5"})),
        ("tcp6:8080:[::1]:50", (("tcp6",), ("8080", "::1", "50"), {})),
        (r"tcp6:8080:\:\:1:50", (("tcp6",), ("8080", "::1", "50"), {})),
        (
            "proxy:ssl:8443:interface=::1:privateKey=a=b",
            tcp("8443", "::1", "proxy", "ssl", privateKey="a=b"),
        ),
        (
            f"ssl:8443:privateKey=k:interface={V6}:certKey=c",
            tcp("8443", V6, "ssl", privateKey="k", certKey="c"),
        ),
        # As Twisted parses it.
        ("tcp:8080:127.0.0.1:50", (("tcp",), ("8080", "127.0.0.1", "50"), {})),
        ("tcp:8080::50", (("tcp",), ("8080", "", "50"), {})),
        ("tcp:interface=localhost:8080", tcp("8080", "localhost")),
        ("tcp:8080:1234", (("tcp",), ("8080", "1234"), {})),
        ("ssl:8443:key.pem:cert.pem", (("ssl",), ("8443", "key.pem", "cert.pem"), {})),
        (r"unix:/a\:b\\c\=d", (("unix",), (r"/a:b\c=d",), {})),
        ("unix:[::1]", (("unix",), ("[", "", "1]"), {})),
        ("ssl:unix:/run/s:mode=660", (("ssl", "unix"), ("/run/s",), {"mode": "660"})),
        ("ssl:systemd:name=web", (("ssl", "systemd"), (), {"name": "web"})),
        ("exotic:::1:a=b=c:d=", (("exotic",), ("", "", "1"), {"a": "b=c", "d": ""})),
        ("a=b:tcp:80", (("tcp",), ("80",), {"a": "b"})),
        ("unix:", (("unix",), ("",), {})),
    ],
)
def test_a_description_is_parsed(text: str, parts: tuple[object, ...]) -> None:
    assert read(text) == parts
    assert parse(text).ours == (not text.startswith("exotic"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("::1:8080", "'::1:8080' may be an IPv6 address or one with a port; write [::1]:8080, or [::1:8080]:PORT"),
        ("tcp6:::1:8080", "'::1:8080' may be an IPv6 address or one with a port; write [::1]:8080"),
        ("proxy:ssl:::1:8443:privateKey=k", "'::1:8443' may be an IPv6 address or one with a port; write [::1]:8443"),
        ("fe80::1", "'fe80::1' is an IPv6 address without a port; write [fe80::1]:PORT"),
        ("tcp:::1", "'::1' is an IPv6 address without a port; write [::1]:PORT"),
        ("8080:127.0.0.1", "'8080:127.0.0.1' begins with a port; write tcp:8080:interface=127.0.0.1"),
        ("80:90", "'80:90' begins with a port; write tcp:80:interface=90 or tcp:90:interface=80"),
        ("tcp:8080:interface=::12345", "interface '::12345' is not an IPv6 address"),
        ("tcp:8080:interface=::1%", "interface '::1%' is not an IPv6 address"),
        ("tcp:8080:fe80::1%eth0:50", "interface 'fe80::1%eth0:50' is not an IPv6 address"),
        ("tcp:8080:interface=[::1", "'[::1' is not an IPv6 address in brackets, such as [::1]"),
        ("tcp:[localhost]:8080", "'[localhost]' is not an IPv6 address in brackets"),
        ("[::1]x:8080", "'[::1]x:8080' is not an IPv6 address in brackets"),
        ("127.0.0.1:8080:50", "too many parts: '50'; only key=value fields follow HOST:PORT"),
        ("tcp::1:8080", "too many parts: '8080'; only key=value fields follow HOST:PORT"),
        ("tcp:[::1]:8080:interface=::1", "interface= is given twice"),
        ("tcp:1:interface=::1:interface=::1", "interface= is given twice"),
        ("unix:/a:mode=1:mode=2", "mode= is given twice"),
        ("tcp:8080\\", "it ends with a backslash"),
        ("a=b", "the type is missing; begin with a type such as tcp: or unix:"),
    ],
)
def test_an_ambiguous_or_invalid_description_is_rejected_with_a_correction(text: str, problem: str) -> None:
    with pytest.raises(ListenError) as caught:
        parse(text)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ttcp:8080", "tcp:…"),
        ("TCP:8080", "tcp:…"),
        ("tcp5:8080", "tcp:…"),
        ("unx:/x", "unix:…"),
        ("system:", "systemd:…"),
        ("tls:8443", "ssl:…"),
        ("https:8443", "ssl:…"),
        ("http://x:1", "tcp:…"),
        ("slwo:x", "slow:…"),
        ("exotic:1", None),
    ],
)
def test_an_unknown_type_is_rejected_with_the_accepted_types_and_a_suggestion(text: str, meant: str | None) -> None:
    said = unknown_type(parse(text), ["slow", "tcp6"])
    assert said.startswith(f"unknown type {text.partition(':')[0]!r}; accepted are 8080, HOST:PORT such as ")
    assert "systemd:, proxy: before these, and of Twisted slow:" in said
    assert "proxy:" not in unknown_type(parse(text), proxy=False).partition("; a host")[0]
    assert re.findall("did you mean (.*)[?]$", said) == ([] if meant is None else [meant])
    # A word that could be a host name is not interpreted as one.
    assert ("a host of that name is tcp:" in said) == bool(re.fullmatch("[^:]*:[0-9]+", text))


def escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(":", "\\:")


def some_address(chance: random.Random) -> str:
    """Return an IPv6 address in a random valid spelling."""
    if chance.random() < 0.2:
        return chance.choice(["::", "::1", "fe80::1%eth0", "::ffff:192.0.2.1", "1:2:3:4:5:6:7:8", "fe80::%a-b.c"])
    groups = [f"{chance.getrandbits(16):x}" for _ in range(8)]
    start = chance.randrange(8)
    return (
        ":".join(groups) if chance.random() < 0.3 else ":".join(groups[:start]) + "::" + ":".join(groups[start + 2 :])
    )


def test_all_spellings_of_an_address_are_parsed_alike() -> None:
    chance = random.Random(20261124)
    for _ in range(1500):
        port = str(chance.randrange(65536))
        host = chance.choice([some_address(chance), "127.0.0.1", "localhost", "a.b-1.example", "*"])
        values = {"backlog": "5", "alpn": "h2", "x": chance.choice(["a=b", "", "a:b", "\\", "[::1]", "=", "::1"])}
        keys = chance.sample(sorted(values), chance.randrange(4))
        fields = [f"{key}={escaped(values[key])}" for key in keys]
        interface = "interface=" + chance.choice(
            [host, host.replace(":", "\\:"), f"[{host}]" if ":" in host else host, host]
        )
        name = address_name(host, int(port))
        prefix = chance.choice(["tcp:", "tcp6:", "ssl:", "ssl:tcp6:", "proxy:tcp:", "haproxy:ssl:", "proxy:ssl:tcp:"])
        cut = chance.randrange(len(fields) + 1)
        forms = [
            prefix + ":".join([port, *fields[:cut], interface, *fields[cut:]]),
            prefix + ":".join([name, *fields]),
            prefix + ":".join([*fields[:cut], interface, f"port={port}", *fields[cut:]]),
        ]
        if prefix in ("tcp:", "proxy:tcp:"):
            forms.append(prefix.removesuffix("tcp:") + ":".join([name, *fields]))
        for form in forms:
            found = parse(form)
            assert {"port": port, **dict(zip(["port"], found.positional, strict=False)), **found.keywords} == {
                "port": port,
                "interface": host,
                **{key: values[key] for key in keys},
            }, form
            assert ":".join([*found.prefixes, found.kind, ""]) == prefix, form


def test_twisted_descriptions_are_parsed_as_twisted_parses_them() -> None:
    """The extensions of this grammar are invalid in Twisted."""
    from twisted.internet.endpoints import _parse, _tokenize

    chance = random.Random(20261125)
    words = [
        "8080",
        "0",
        "",
        ":",
        ":",
        ":",
        "=",
        "\\:",
        "\\",
        "a",
        "::1",
        "127.0.0.1",
        "interface=",
        "backlog=",
        "[",
        "]",
    ]
    same = 0
    for _ in range(12_000):
        kind = chance.choice(["tcp", "tcp6", "ssl", "unix", "systemd", "slow"])
        text = f"{kind}:{''.join(chance.choices(words, k=chance.randrange(1, 7)))}"
        try:
            positional, keywords = _parse(text)
        except RuntimeError:  # a backslash at the end
            with pytest.raises(ListenError):
                parse(text)
            continue
        names = ["interface", "backlog"]
        servable = kind not in ("tcp", "tcp6", "ssl") or (
            # The port is the first argument, and there are no more arguments than Twisted accepts.
            re.fullmatch("[0-9]+", "".join(positional[1:2]))
            and len(positional) <= 4
            and not any(name in keywords for name in names[: len(positional) - 2])
            and not any("[" in value for value in (*positional[2:3], keywords.get("interface", "")))
        )
        given_twice = [token[1] for token in _tokenize(text)].count(":") + 1 != len(positional) + len(keywords)
        if not servable or given_twice:
            continue
        found = parse(text)
        assert [found.kind, *found.positional] == positional, text
        assert found.keywords == keywords, text
        same += 1
    assert same > 2000


@pytest.mark.parametrize("prefix", ["", "ssl:", "proxy:", "proxy:ssl:"])
def test_a_logged_listener_name_is_a_valid_description(prefix: str) -> None:
    chance = random.Random(20261126)
    for _ in range(300):
        host, port = chance.choice([some_address(chance), "0.0.0.0", "127.0.0.1"]), chance.randrange(65536)
        address, _, zone = host.partition("%")
        printed = prefix + tcp_name(address, port, zone).removeprefix("tcp:" if prefix.endswith("ssl:") else "")
        found = parse(printed)
        assert (found.positional, found.interface) == ((str(port),), host), printed
        path = "/run/" + "".join(chance.choices("ab:=\\[]% /*", k=8))
        found = parse(prefix + unix_name(path))
        assert (found.kind, found.positional, found.keywords) == ("unix", (path,), {})


@pytest.mark.parametrize(
    ("text", "host"),
    [("[::1]", "::1"), ("::1", "::1"), ("[fe80::1%eth0]", "fe80::1%eth0"), ("localhost", "localhost"), ("[x]", "[x]")],
)
def test_brackets_are_removed_from_a_host(text: str, host: str) -> None:
    assert bare_host(text) == host


@pytest.mark.parametrize(
    ("description", "interface"),
    [
        ("9090", ""),
        ("tcp:9090:interface=web-1", "web-1"),
        ("tcp:9090:web-1", "web-1"),
        ("status.example.com:9090", "status.example.com"),
        (r"tcp6:9090:interface=\:\:1", "::1"),
        ("ssl:9090:privateKey=k:certKey=c:interface=web-1", "web-1"),
        ("ssl:tcp:9090:web-1:privateKey=k:certKey=c", "web-1"),
        ("unix:/run/status", ""),
        ("systemd:name=status", ""),
        ("", ""),
    ],
)
def test_a_description_yields_its_interface(description: str, interface: str) -> None:
    assert parse(description).interface == interface


@pytest.mark.parametrize(
    "text", ["tcp:8080" + ":a" * 200_000, ":]" * 200_000, "ssl:ssl" + ":" * 200_000, "proxy" + ":proxy" * 200_000]
)
def test_parsing_a_long_description_takes_linear_time(text: str) -> None:
    with contextlib.suppress(ListenError):
        parse(text)  # quadratic time would take minutes
