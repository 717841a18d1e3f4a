"""Choose what carries the hub of a process to other processes: Redis, the mesh of the workers, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger

from rtservice.events import HUB_UNUSED
from rtservice.hub.carrier import Carrier
from rtservice.hub.local import LocalCarrier
from rtservice.hub.redis_url import parse_hub_url
from rtservice.interfaces import IHubUser


def make_carrier(url: str, log: Logger, mesh: Callable[[], Carrier] = LocalCarrier) -> Carrier:
    """Return the carrier for a process.

    `url` is the value of `--hub`, or empty. `mesh` returns the carrier of a process without a URL. Raises BadHubURL if
    the URL is invalid, or if a library or a file that it needs is missing.
    """
    if not url:
        return mesh()
    from rtservice.hub.redis import RedisCarrier  # most services do without it

    return RedisCarrier(parse_hub_url(url), log)


def warn_if_unused(url: str, factory: Any, log: Logger) -> None:
    """Log a warning if a URL of the hub is set, and the factory does not use the hub."""
    if url and IHubUser(factory, None) is None:
        HUB_UNUSED.log(log, factory=type(factory).__name__)
