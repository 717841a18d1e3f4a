"""Redis servers, and hubs on them in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.logger import Logger

from rtservice.hub import redis as redis_carrier
from rtservice.hub import redis_endpoints
from rtservice.hub.hub import Hub
from rtservice.hub.redis import RedisCarrier
from rtservice.hub.redis_url import parse_hub_url
from tests.support.deadline import DEADLINE
from tests.support.redis import RedisGroup, RedisServer


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[[RedisServer], RedisServer]]:
    """Start a server, and kill it after the test."""
    servers: list[RedisServer] = []

    def start(server: RedisServer) -> RedisServer:
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def redis(start_redis, tmp_path: Path) -> Callable[..., RedisServer]:
    """Start a redis-server with options of its configuration."""

    def start(options: dict[str, str] | None = None, *, tls: bool = False) -> RedisServer:
        server: RedisServer = start_redis(RedisServer(tmp_path, options or {}, tls=tls))
        return server

    return start


@pytest.fixture
def group(start_redis, tmp_path: Path) -> RedisGroup:
    """A master, a replica and three sentinels."""
    return RedisGroup(start_redis, tmp_path)


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """The log records of the hubs."""
    return []


def set_timeouts(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(redis_carrier, "BEAT_TIMEOUT", seconds)
    monkeypatch.setattr(redis_carrier, "PREPARE_SECONDS", seconds)
    monkeypatch.setattr(redis_endpoints, "CONNECT_SECONDS", seconds)


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time between heartbeats. The timeouts are long: a Redis on a busy machine exceeds none."""
    monkeypatch.setattr(redis_carrier, "BEAT_SECONDS", 0.1)
    set_timeouts(monkeypatch, DEADLINE)


@pytest.fixture
def quick_timeouts(monkeypatch: pytest.MonkeyPatch, quick_beats: None) -> None:
    """Shorten the timeouts of heartbeats and of the preparation, for tests that wait for them."""
    set_timeouts(monkeypatch, 1.0)


@pytest_twisted.async_yield_fixture
async def hub(records) -> Any:
    """Start a hub for a URL; the hubs stop after the test."""
    hubs: list[Hub] = []

    def start(url: str) -> Hub:
        log = Logger("tests", observer=records.append)
        started = Hub(RedisCarrier(parse_hub_url(url), log), log)
        hubs.append(started)
        started.start(reactor)
        return started

    yield start
    for started in hubs:
        if started.started:
            await started.stop()
