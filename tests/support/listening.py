"""Where a service listens, as its events say."""

import re
from typing import Any


def port_of(service: Any, kind: str, number: int = 1) -> int:
    """The port of its listener of a kind such as `proxy:ssl`, or of the one of this number among those events."""
    listening = service.wait_event("listener.listening", number, listener=re.compile(f"^{kind}:"))
    return int(listening["listener"].rpartition(":")[2])
