"""A Launch with defaults for tests: no check, and no reports."""

from typing import Any

from rtservice.process.service import Launch
from rtservice.process.systemd import Notifier


def launch(**fields: Any) -> Launch:
    """Return a Launch with these fields."""
    defaults: dict[str, Any] = {
        "check": lambda: None,
        "report": lambda problem: None,
        "exit_now": lambda: None,
        "notifier": Notifier(),
        "dropped": lambda: 0,
        "protocol": "echo",
        "hint": "",
        "log_observer": None,
    }
    return Launch(**{**defaults, **fields})
