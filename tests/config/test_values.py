"""Each kind of value accepts the documented texts, and rejects all others with an error that quotes the text."""

import ipaddress
import re

import pytest

from rtservice.config.values import (
    ESCAPED,
    FLAG,
    HOSTS,
    NETWORKS,
    SettingError,
    as_text,
    either,
    seconds,
    whole_number,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Hello", b"Hello"),
        ("", b""),
        (r"a\r\n", b"a\r\n"),
        (r"\x00\xfF\t\0\e\\n", b"\x00\xff\t\0\x1b\\n"),
        ("grüß", "grüß".encode()),
        ("\udcff", b"\xff"),  # a byte of the command line that is not UTF-8
    ],
)
def test_escapes_are_decoded_to_bytes(text: str, value: bytes) -> None:
    assert ESCAPED.parse(text) == value


@pytest.mark.parametrize("text", [r"\q", r"\x1", r"\xzz", "end\\"])
def test_an_unknown_escape_is_rejected(text: str) -> None:
    with pytest.raises(SettingError, match="unknown escape"):
        ESCAPED.parse(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "11", "1.0", "1_0", " 5", "٣", "9" * 40])
def test_an_invalid_or_out_of_range_number_is_rejected(text: str) -> None:
    with pytest.raises(SettingError, match="whole number from 0 to 10"):
        whole_number(0, 10).parse(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "0.09", "11", "1e0", "1.", ".5", "nan", "inf", "1 s", "9" * 40])
def test_an_invalid_or_out_of_range_time_is_rejected(text: str) -> None:
    with pytest.raises(SettingError, match=r"number of seconds from 0\.1 to 10$"):
        seconds(0.1, 10).parse(text)


def test_a_keyword_is_accepted_besides_numbers() -> None:
    kind = either("auto", None, whole_number(1, 9))
    assert kind.parse("auto") is None
    assert kind.parse("9") == 9
    with pytest.raises(SettingError, match="'Auto' is not auto or a whole number from 1 to 9"):
        kind.parse("Auto")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", ()),
        ("status.example.com", ("status.example.com",)),
        ("Web-1, rt_service.,xn--bcher-kva.example", ("web-1", "rt_service", "xn--bcher-kva.example")),
        ("*", ("*",)),
        ("127.0.0.1", ("127.0.0.1",)),
        ("::1, [2001:DB8::1],a", ("::1", "2001:db8::1", "a")),
    ],
)
def test_host_names_are_converted_to_lower_case(text: str, hosts: tuple[str, ...]) -> None:
    assert HOSTS.parse(text) == hosts
    assert HOSTS.parse(as_text(hosts)) == hosts


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "a,",
        "a b",
        "a:80",
        "http://a",
        "[::1",
        "[a]",
        "[::1]:80",
        "*.example.com",
        "-a",
        "a..b",
        "b\xfccher.example",
        "a" * 64,
    ],
)
def test_an_invalid_host_name_is_rejected(text: str) -> None:
    with pytest.raises(SettingError, match="is not a host name such as"):
        HOSTS.parse(text)


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("10.0.0.0/8", ["10.0.0.0/8"]),
        ("192.0.2.1", ["192.0.2.1/32"]),
        ("2001:db8::1", ["2001:db8::1/128"]),
        ("[2001:db8::1]", ["2001:db8::1/128"]),
        ("::1,[2001:db8::]/32", ["::1/128", "2001:db8::/32"]),
        ("127.0.0.0/8, ::1/128,0.0.0.0/0", ["127.0.0.0/8", "::1/128", "0.0.0.0/0"]),
    ],
)
def test_networks_are_addresses_with_or_without_a_prefix(text: str, networks: list[str]) -> None:
    assert NETWORKS.parse(text) == tuple(map(ipaddress.ip_network, networks))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a network"),
        ("10.0.0.0/8,", "'' is not a network"),
        ("5", "'5' is not a network"),
        ("localhost", "'localhost' is not a network"),
        ("[10.0.0.1]", "'[10.0.0.1]' is not a network"),
        ("[::1", "'[::1' is not a network"),
        ("10.0.0.0/33", "'10.0.0.0/33' is not a network"),
        ("10.0.0.0/8/8", "'10.0.0.0/8/8' is not a network"),
        ("fe80::1%eth0", "'fe80::1%eth0' is not a network"),
        ("127.0.0.1/8", "'127.0.0.1/8' has bits beyond its prefix: the network is 127.0.0.0/8"),
        ("2001:db8::1/64", "the network is 2001:db8::/64"),
    ],
)
def test_an_invalid_network_is_rejected(text: str, problem: str) -> None:
    with pytest.raises(SettingError, match=re.escape(problem)):
        NETWORKS.parse(text)


@pytest.mark.parametrize("text", ["", "1", "yes", "True"])
def test_a_flag_is_true_or_false(text: str) -> None:
    assert (FLAG.parse("true"), FLAG.parse("false")) == (True, False)
    with pytest.raises(SettingError, match=f"'{text}' is not true or false"):
        FLAG.parse(text)
