"""URLs of `--hub`: parsed and checked, without a connection.

    redis://[user[:password]@]host[:port][/database]             TCP
    rediss://...                                                 TCP with TLS
    redis+unix://[user[:password]@]/path/of/socket?db=0          UNIX socket
    redis+sentinel://[user[:password]@]host[:port],.../name[/database]
                                                                 the master that sentinels name
    rediss+sentinel://...                                        the same, both with TLS

Options follow a question mark, as `?prefix=chat&cafile=/etc/ssl/redis.pem`. A user, a password and the value of an
option are percent-encoded (RFC 3986, section 2.1). IPv6 addresses are in brackets.

No error repeats text of the URL: the part that is wrong may be a piece of a password with an unescaped character.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from rtservice.hidden import HIDDEN
from rtservice.interfaces import Secret

PORT = 6379
SENTINEL_PORT = 26379

# The namespace of keys and channels in Redis, unless the URL has another `prefix`.
PREFIX = "rtservice"

SCHEMES = ("redis", "rediss", "redis+unix", "redis+sentinel", "rediss+sentinel")

_TLS_OPTIONS = ("cafile", "certfile", "keyfile", "verify")
_SENTINEL_OPTIONS = ("sentinel_user", "sentinel_password")

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_PREFIX = re.compile(r"[A-Za-z0-9._:/{}-]{1,64}")
_LARGEST_DATABASE = (1 << 31) - 1
# Of a percent sign that is not followed by two hexadecimal digits.
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")

# A host, or an IP address without brackets, and a port.
Address = tuple[str, int]


class BadHubURL(ValueError):  # noqa: N818  # as net.description.BadDescription
    """A URL of the hub, or a file that it names, is invalid. The text has no secrets."""


@dataclass(frozen=True)
class Login:
    """A user and a password: of Redis, or of its sentinels."""

    user: str
    password: Secret


@dataclass(frozen=True)
class TLSFiles:
    """The TLS options of a URL. Empty paths are the defaults: authorities of the system, no client certificate."""

    cafile: str = ""
    certfile: str = ""
    keyfile: str = ""
    verify: bool = True


@dataclass(frozen=True)
class HubURL:
    """A parsed URL. Its `repr` has no secrets.

    `addresses` are hosts and ports of the one server or of the sentinels. `path` is the UNIX socket, or empty. `master`
    is the name that sentinels know, or empty. `shown` is the URL without secrets, for logs and the status page.
    """

    shown: str
    addresses: tuple[Address, ...]
    path: str
    master: str
    database: int
    prefix: str
    login: Login | None
    sentinel_login: Login | None
    tls: TLSFiles | None


def shown_address(address: Address) -> str:
    """Return `host:port`, with an IPv6 address in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_hub_url(text: str) -> HubURL:
    """Return the parsed URL. Raises BadHubURL, which names the part that is wrong."""
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in SCHEMES:
        raise BadHubURL(f"the URL of the hub must begin with {', '.join(f'{known}://' for known in SCHEMES)}")
    if not rest.isprintable() or " " in rest:
        raise BadHubURL("the URL of the hub has a space or an unprintable character; percent-encode it")
    if "#" in rest:
        raise BadHubURL("the URL of the hub has a #; percent-encode it as %23")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if "@" in path or "@" in query:
        raise BadHubURL("a user, password or option of the hub has an unescaped /, ? or @; percent-encode it")
    userinfo, at, hosts = authority.rpartition("@")
    if "@" in userinfo:
        raise BadHubURL("the user or password of the hub has an unescaped @; percent-encode it as %40")
    sentinel, unix, tls = scheme.endswith("+sentinel"), scheme == "redis+unix", scheme.startswith("rediss")
    known = [
        "prefix",
        *(_TLS_OPTIONS if tls else ()),
        *(_SENTINEL_OPTIONS if sentinel else ()),
        *(["db"] if unix else ()),
    ]
    options = _options(query, known)
    master, database, socket = "", path if slash else "", ""
    if unix:
        if hosts or not path:
            raise BadHubURL("redis+unix:// needs the absolute path of a socket, as redis+unix:///run/redis.sock")
        socket, database = _decoded(f"/{path}", "path"), options.get("db", "")
    elif sentinel:
        name, _, database = path.partition("/")
        master = _decoded(name, "name of the master")
        if not master:
            raise BadHubURL("the name of the master is missing, as in redis+sentinel://host:26379/mymaster")
    if hosts.count(",") and not sentinel:
        raise BadHubURL("only the URL of sentinels has several hosts")
    default = SENTINEL_PORT if sentinel else PORT
    return HubURL(
        shown=f"{scheme}://{HIDDEN + '@' if at else ''}{hosts}{slash}{path}",
        addresses=() if unix else tuple(_address(host, default) for host in hosts.split(",")),
        path=socket,
        master=master,
        database=_database(database),
        prefix=_prefix(options),
        login=_login(userinfo, "hub") if at else None,
        sentinel_login=_sentinel_login(options),
        tls=_tls(options) if tls else None,
    )


def _options(query: str, known: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for option in query.split("&") if query else ():
        name, equals, value = option.partition("=")
        if name not in known:
            raise BadHubURL(f"the URL of the hub has an unknown option; known are {', '.join(known)}")
        if name in options:
            raise BadHubURL(f"the URL of the hub has the option {name} twice")
        if not equals or not value:
            raise BadHubURL(f"the option {name} of the hub has no value")
        options[name] = _decoded(value, f"option {name}")
    return options


def _decoded(text: str, part: str) -> str:
    if _BAD_PERCENT.search(text):
        raise BadHubURL(f"the {part} of the hub has a % without two hexadecimal digits; percent-encode it as %25")
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise BadHubURL(f"the {part} of the hub is not UTF-8") from None
    if "\0" in decoded:
        raise BadHubURL(f"the {part} of the hub has a null character")
    return decoded


def _address(host: str, default: int) -> Address:
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise BadHubURL("the host of the hub is not an IPv6 address in brackets, as [::1]:6379")
        try:
            name = str(ipaddress.IPv6Address(name.replace("%25", "%", 1)))
        except ValueError:
            raise BadHubURL("the host of the hub is not an IPv6 address in brackets, as [::1]:6379") from None
        port = port[1:]
    else:
        name, _, port = host.partition(":")
        if ":" in port:
            raise BadHubURL("the host of the hub has several colons; put an IPv6 address in brackets, as [::1]:6379")
        if not name:
            raise BadHubURL("the host of the hub is missing")
        if not _HOST.fullmatch(name):
            raise BadHubURL("the host of the hub is not a host name or an IP address")
    if not port:
        return name, default
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise BadHubURL("the port of the hub is not a number from 1 to 65535")
    return name, int(port)


def _database(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _LARGEST_DATABASE):
        raise BadHubURL("the database of the hub is not a number, as in redis://localhost:6379/0")
    return int(text)


def _prefix(options: dict[str, str]) -> str:
    prefix = options.get("prefix", PREFIX)
    if not _PREFIX.fullmatch(prefix):
        raise BadHubURL("the option prefix of the hub must have 1 to 64 of letters, digits and ._:/{}-")
    return prefix


def _login(userinfo: str, part: str) -> Login | None:
    user, colon, password = userinfo.partition(":")
    if ":" in password:
        raise BadHubURL(f"the password of the {part} has an unescaped colon; percent-encode it as %3A")
    if user and not colon:
        raise BadHubURL(f"the user of the {part} has no password; one without a user follows a colon, as :secret@")
    if not user and not password:
        return None
    return Login(_decoded(user, "user"), Secret(_decoded(password, "password")))


def _sentinel_login(options: dict[str, str]) -> Login | None:
    user, password = options.get("sentinel_user", ""), options.get("sentinel_password")
    if password is None:
        if user:
            raise BadHubURL("the option sentinel_user of the hub needs sentinel_password")
        return None
    return Login(user, Secret(password))


def _tls(options: dict[str, str]) -> TLSFiles:
    verify = options.get("verify", "yes")
    if verify not in ("yes", "no"):
        raise BadHubURL("the option verify of the hub must be yes or no")
    if "keyfile" in options and "certfile" not in options:
        raise BadHubURL("the option keyfile of the hub needs certfile")
    files = {name: options.get(name, "") for name in ("cafile", "certfile", "keyfile")}
    return TLSFiles(**files, verify=verify == "yes")
