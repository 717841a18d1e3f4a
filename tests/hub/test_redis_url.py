"""URLs of the hub: what they mean, and errors that show no secrets."""

from __future__ import annotations

import pytest

from rtservice.hub.redis_url import BadHubURL, Login, TLSFiles, parse_hub_url
from rtservice.interfaces import Secret

SECRET = "hunter2!"


def test_the_shortest_url_has_all_defaults() -> None:
    url = parse_hub_url("redis://localhost")
    assert url.addresses == (("localhost", 6379),)
    assert (url.database, url.prefix, url.master, url.path) == (0, "rtservice", "", "")
    assert url.login is url.tls is url.sentinel_login is None
    assert url.shown == "redis://localhost"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://127.0.0.1:7000/3", (("127.0.0.1", 7000),)),
        ("redis://[::1]", (("::1", 6379),)),
        ("redis://[2001:db8::1]:7000", (("2001:db8::1", 7000),)),
        ("redis://[fe80::1%25eth0]:7000", (("fe80::1%eth0", 7000),)),
        ("REDIS://redis-1.example.org./", (("redis-1.example.org.", 6379),)),
        ("redis+sentinel://a,b:1,[::1]:2/main/4", (("a", 26379), ("b", 1), ("::1", 2))),
        ("redis+unix:///run/redis.sock", ()),
    ],
)
def test_addresses(text: str, expected: tuple[tuple[str, int], ...]) -> None:
    assert parse_hub_url(text).addresses == expected


@pytest.mark.parametrize(
    ("userinfo", "login"),
    [
        ("ann:secret@", Login("ann", Secret("secret"))),
        (":secret@", Login("", Secret("secret"))),
        ("ann:@", Login("ann", Secret(""))),
        (":@", None),
        ("@", None),
        ("a%3An:p%40%2F%3A%25%C3%B6@", Login("a:n", Secret("p@/:%ö"))),
        ("ann:it's$(secret)!@", Login("ann", Secret("it's$(secret)!"))),
    ],
)
def test_users_and_passwords(userinfo: str, login: Login | None) -> None:
    assert parse_hub_url(f"redis://{userinfo}localhost").login == login


def test_a_socket_has_a_path_and_a_database() -> None:
    url = parse_hub_url("redis+unix://ann:secret@/run/my%20redis.sock?db=2&prefix=chat")
    assert (url.path, url.database, url.prefix) == ("/run/my redis.sock", 2, "chat")
    assert url.login == Login("ann", Secret("secret"))


def test_sentinels_have_a_master_and_a_separate_login() -> None:
    url = parse_hub_url(
        "rediss+sentinel://ann:a@h1,h2/my%2Dmaster/5?sentinel_user=bob&sentinel_password=b%26&verify=no"
    )
    assert (url.master, url.database) == ("my-master", 5)
    assert (url.login, url.sentinel_login) == (Login("ann", Secret("a")), Login("bob", Secret("b&")))
    assert url.tls == TLSFiles(verify=False)


def test_tls_options() -> None:
    url = parse_hub_url("rediss://h?cafile=/etc/ca.pem&certfile=c.pem&keyfile=k%20.pem&verify=yes")
    assert url.tls == TLSFiles("/etc/ca.pem", "c.pem", "k .pem", verify=True)
    assert parse_hub_url("rediss://h").tls == TLSFiles()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "must begin with redis://"),
        ("localhost", "must begin with"),
        ("http://localhost", "must begin with"),
        ("redis:localhost", "must begin with"),
        ("redis://", "host of the hub is missing"),
        ("redis://:6379", "host of the hub is missing"),
        ("redis://a b", "space or an unprintable"),
        ("redis://a\x00b", "space or an unprintable"),
        ("redis://h#1", "%23"),
        ("redis://-h", "not a host name"),
        ("redis://h:0", "port"),
        ("redis://h:65536", "port"),
        ("redis://h:²", "port"),
        ("redis://h:123456789012345678901234567890", "port"),
        ("redis://::1", "brackets"),
        ("redis://[::1", "brackets"),
        ("redis://[::1]6379", "brackets"),
        ("redis://[h]", "brackets"),
        ("redis://h/x", "database"),
        ("redis://h/-1", "database"),
        ("redis://h/1/2", "database"),
        ("redis://h/4294967296", "database"),
        ("redis://a,b", "several hosts"),
        ("redis://user@h", "no password"),
        ("redis://u:a:b@h", "unescaped colon"),
        ("redis://u:a@b@h", "unescaped @"),
        ("redis://u:%zz@h", "%25"),
        ("redis://u:%@h", "%25"),
        ("redis://u:%ff@h", "not UTF-8"),
        ("redis://u:%00@h", "null"),
        ("redis://h?x=1", "unknown option; known are prefix"),
        ("redis://h?cafile=/x", "unknown option"),
        ("redis://h?prefix=a&prefix=b", "twice"),
        ("redis://h?prefix", "no value"),
        ("redis://h?prefix=", "no value"),
        ("redis://h?prefix=a%20b", "prefix"),
        (f"redis://h?prefix={'a' * 65}", "prefix"),
        ("rediss://h?verify=maybe", "yes or no"),
        ("rediss://h?keyfile=k", "certfile"),
        ("redis+sentinel://h", "name of the master"),
        ("redis+sentinel://h/", "name of the master"),
        ("redis+sentinel://h,/m", "host of the hub is missing"),
        ("redis+sentinel://h/m?sentinel_user=u", "sentinel_password"),
        ("redis+unix://host/path", "absolute path"),
        ("redis+unix://", "absolute path"),
        ("redis+unix:///", "absolute path"),
        ("redis+unix:///p?db=x", "database"),
    ],
)
def test_an_error_names_the_part(text: str, part: str) -> None:
    with pytest.raises(BadHubURL) as caught:
        parse_hub_url(text)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"redis://{SECRET}",
        f"redis://u:{SECRET}",
        f"redis://u:{SECRET}@",
        f"redis://u:{SECRET}@h:x",
        f"redis://u:{SECRET}@h/x",
        f"redis://{SECRET}@h",
        f"redis://u:{SECRET}%@h",
        f"redis://u:a:{SECRET}@h",
        f"redis://u:a@{SECRET}@h",
        f"redis://u:a/{SECRET}@h",
        f"redis://u:a?{SECRET}@h",
        f"redis://u:a?x={SECRET}@h",
        f"redis://u:a#{SECRET}@h",
        f"redis://u:a {SECRET}@h",
        f"redis://u:{SECRET}/@h/{SECRET}",
        f"redis+sentinel://h/m?sentinel_password={SECRET}&x={SECRET}",
        f"redis+sentinel://h/m?{SECRET}={SECRET}",
        f"{SECRET}://h",
        SECRET,
    ],
)
def test_an_error_does_not_contain_a_secret(text: str) -> None:
    with pytest.raises(BadHubURL) as caught:
        parse_hub_url(text)
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None or SECRET not in repr(caught.value.__context__)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"redis://u:{SECRET}@h:1/2?prefix=a", "redis://<hidden>@h:1/2"),
        (f"redis+sentinel://:{SECRET}@a,b/m?sentinel_password={SECRET}", "redis+sentinel://<hidden>@a,b/m"),
        (f"redis+unix://:{SECRET}@/run/s", "redis+unix://<hidden>@/run/s"),
    ],
)
def test_a_url_is_shown_without_its_secrets(text: str, shown: str) -> None:
    url = parse_hub_url(text)
    assert url.shown == shown
    assert SECRET not in repr(url)
    assert SECRET not in str(url)
