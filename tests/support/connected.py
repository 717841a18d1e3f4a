"""Wait until hubs can be used."""

from __future__ import annotations

from rtservice.hub.hub import Hub
from tests.support.eventually import eventually


async def connected(*hubs: Hub) -> None:
    """Wait until all these hubs are up: before that, `publish`, `members` and `claim` fail."""
    await eventually(lambda: all(hub.up for hub in hubs))
