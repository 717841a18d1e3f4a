"""From settings to what a serving process takes: limits, timeouts, log levels, and the share of each worker."""

from __future__ import annotations

from rtservice.config.schema import Settings
from rtservice.observe.logs import LevelName
from rtservice.process.admission import Limits
from rtservice.process.server import RuntimeSettings, default_max_connections, raise_descriptor_limit


def runtime_settings(in_force: Settings, *, slot: int = 0, slots: int = 1, beside: int = 0) -> RuntimeSettings:
    """What may change while the service runs, as the host takes it; of `slots` processes, this one's share.

    The descriptor limit is each process's own; `beside` descriptors of it are reserved for the status server.
    `max_connections` is divided evenly, `max_connections_per_peer` too, but rounded up, since the kernel spreads a
    peer's connections by chance.
    """
    descriptors = raise_descriptor_limit()
    total = in_force.max_connections
    return RuntimeSettings(
        limits=Limits(
            max_connections=(
                default_max_connections(descriptors, beside) if total is None else share(total, slot, slots)
            ),
            max_connections_per_peer=-(-in_force.max_connections_per_peer // slots),
            peer_prefix_v6=in_force.peer_prefix_v6,
            at_limit=in_force.at_limit,
            idle_timeout=in_force.idle_timeout,
            proxy_from=in_force.proxy_from,
        ),
        handshake_timeout=in_force.handshake_timeout,
        drain_timeout=in_force.drain_timeout,
        watch_certificates=in_force.watch_certificates and slots == 1,
    )


def levels(in_force: Settings) -> dict[str, LevelName]:
    """The least level of each namespace that has one."""
    return {least.namespace: least.level for least in in_force.log_level}


def share(total: int, slot: int, slots: int) -> int:
    """What of a total one slot may have: together it is the total, and 1 at the least."""
    return max(1, total // slots + (slot < total % slots))
