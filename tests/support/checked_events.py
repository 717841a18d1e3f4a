"""Checks that each event logged in this process has its declared fields with the declared types."""

from collections.abc import Callable
from typing import Any

from rtservice.events import FIELDS, Event, LimitedEvent

# The problems found. A list, because the code that logs could catch an exception.
found: list[str] = []


def problems(event: Event, fields: dict[str, object]) -> list[str]:
    """Return the problems with the fields of a record."""
    if fields.keys() != set(event.fields):
        return [f"{event.name} has the fields {sorted(fields)} instead of {sorted(event.fields)}"]
    return [
        f"{event.name}: {name} is {value!r}"
        for name, value in fields.items()
        if not isinstance(value, FIELDS[name].types) or isinstance(value, bool)
    ]


def _checked(log: Callable[..., None]) -> Callable[..., None]:
    def logs(event: Event, logger: Any, *failure: Any, **fields: object) -> None:
        found.extend(problems(event, {name: value for name, value in fields.items() if name != "level"}))
        log(event, logger, *failure, **fields)

    return logs


def install() -> None:
    """Wrap the log methods of events with the check."""
    for kind in (Event, LimitedEvent):
        for name in ("log", "failure"):
            if name in vars(kind):
                setattr(kind, name, _checked(vars(kind)[name]))
