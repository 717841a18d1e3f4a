"""Ports of a service, from its events."""

import re
from typing import Any


def port_of(service: Any, kind: str, number: int = 1) -> int:
    """Return the port of the listener of a kind such as `proxy:ssl`; `number` selects among several."""
    listening = service.wait_event("listener.listening", number, listener=re.compile(f"^{kind}:"))
    return int(listening["listener"].rpartition(":")[2])
