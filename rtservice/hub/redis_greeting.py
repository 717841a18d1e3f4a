"""The beginning of a connection to Redis: authentication, the database, and the checks that the server is usable."""

from __future__ import annotations

from typing import Any, NamedTuple

from rtservice.escaping import escaped
from rtservice.hub.connect_errors import ConnectFailed
from rtservice.hub.redis_url import HubURL
from rtservice.hub.resp import RedisConnection, Refused

# HRANDFIELD, which `members` uses, needs it.
OLDEST = (6, 2)

# Error replies to HELLO. Their own texts are not shown, because that of an unknown command repeats its arguments.
_REFUSALS = {
    "WRONGPASS": "wrong user or password (WRONGPASS)",
    "NOAUTH": "Redis needs a password (NOAUTH): redis://user:password@host",
    "NOPERM": "the user has no permission for HELLO (NOPERM)",
    "DENIED": "Redis is in protected mode, which accepts only clients of the same host (DENIED)",
    "NOPROTO": "Redis does not support RESP3 (NOPROTO); version 6.2 or later is needed",
}


class Greeting(NamedTuple):
    """What a server said. `run` identifies the run of the server process; empty if the user may not ask for it."""

    client: int
    run: str
    evicts: bool  # whether it may remove keys that have no expiry


async def greet(connection: RedisConnection, url: HubURL) -> Greeting:
    """Authenticate, select the database, and check that the server is a master. Raises ConnectFailed."""
    hello = await _hello(connection, url)
    if hello.get(b"mode") == b"cluster":
        raise ConnectFailed("the server is part of a Redis Cluster; use a single Redis, or sentinels")
    version = hello.get(b"version", b"").decode("ascii", "replace")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        raise ConnectFailed(f"Redis has the version {escaped(version)[:20]}; version 6.2 or later is needed")
    if url.database:
        try:
            await connection.request(b"SELECT", url.database)
        except Refused as refusal:
            raise ConnectFailed(f"database {url.database}: {refusal.shown}") from None
    try:
        check_role(await connection.request(b"ROLE"))
    except Refused as refusal:
        raise ConnectFailed(f"ROLE: {refusal.shown}") from None
    server, memory = await _info(connection, b"server"), await _info(connection, b"memory")
    evicts = memory.get("maxmemory", "0") != "0" and memory.get("maxmemory_policy", "").startswith("allkeys")
    return Greeting(hello.get(b"id", 0), server.get("run_id", ""), evicts)


async def _hello(connection: RedisConnection, url: HubURL) -> dict[bytes, Any]:
    login = () if url.login is None else (b"AUTH", url.login.user or "default", url.login.password.reveal())
    try:
        reply = await connection.request(b"HELLO", 3, *login, b"SETNAME", b"rtservice")
    except Refused as refusal:
        text = str(refusal)
        if "max number of clients" in text:
            raise ConnectFailed("Redis has reached its limit of clients (maxclients)") from None
        if "without any password configured" in text:
            raise ConnectFailed("Redis has no password for the user default; remove it from the URL") from None
        unknown = "Redis refused HELLO; version 6.2 or later is needed"
        raise ConnectFailed(_REFUSALS.get(refusal.code, unknown)) from None
    if not isinstance(reply, dict):
        raise ConnectFailed("the server did not answer HELLO as Redis does")
    return reply


async def _info(connection: RedisConnection, section: bytes) -> dict[str, str]:
    try:
        reply = await connection.request(b"INFO", section)
    except Refused:
        return {}
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value for name, colon, value in pairs if colon}


def check_role(reply: Any) -> None:
    """Raise ConnectFailed unless a reply to ROLE is that of a master."""
    role = reply[0] if isinstance(reply, list) and reply else None
    if role == b"master":
        return
    if role == b"slave":
        master = escaped(b":".join(map(_as_bytes, reply[1:3])).decode("utf-8", "replace"))
        raise ConnectFailed(f"the server is a replica of {master}, not a master")
    raise ConnectFailed("the server is not a Redis master; the URL of sentinels begins with redis+sentinel://")


def _as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
