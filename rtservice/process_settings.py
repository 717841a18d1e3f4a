"""Derive the runtime settings of a serving process: limits, timeouts, log levels, and the share of each worker."""

from __future__ import annotations

import os

from rtservice.config.schema import Settings
from rtservice.observe.logs import LevelName
from rtservice.process.admission import Limits
from rtservice.process.server import RuntimeSettings, default_max_connections, raise_descriptor_limit


def runtime_settings(settings: Settings, *, slot: int = 0, slots: int = 1, reserved: int = 0) -> RuntimeSettings:
    """Return the runtime settings of the process in slot `slot` (from 0) of `slots`.

    `max_connections` and `max_connections_per_peer` are divided evenly among the slots. The latter is rounded up, since
    the kernel distributes a peer's connections at random. The default of `max_connections` depends on the descriptor
    limit, which applies to each process; `reserved` of these descriptors are reserved for the status server.
    """
    descriptors = raise_descriptor_limit()
    total = settings.max_connections
    return RuntimeSettings(
        limits=Limits(
            max_connections=(
                default_max_connections(descriptors, reserved) if total is None else share(total, slot, slots)
            ),
            max_connections_per_peer=-(-settings.max_connections_per_peer // slots),
            peer_prefix_v6=settings.peer_prefix_v6,
            at_limit=settings.at_limit,
            idle_timeout=settings.idle_timeout,
            proxy_from=settings.proxy_from,
        ),
        handshake_timeout=settings.handshake_timeout,
        drain_timeout=settings.drain_timeout,
        hub_required=settings.hub_required,
        watch_certificates=settings.watch_certificates and slots == 1,
    )


def process_count(settings: Settings) -> int:
    """Return the number of processes that serve: `--workers`, or the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if settings.workers is None else settings.workers


def levels(settings: Settings) -> dict[str, LevelName]:
    """Return the minimum log level of each namespace that has one."""
    return {rule.namespace: rule.level for rule in settings.log_level}


def share(total: int, slot: int, slots: int) -> int:
    """Return the share of one slot. The shares add up to the total, except that each is at least 1."""
    return max(1, total // slots + (slot < total % slots))
