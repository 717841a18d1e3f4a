"""Checks each event that is logged in this process: its fields are those that it declares, and have their types."""

from collections.abc import Callable
from typing import Any

from rtservice.events import FIELDS, Event, LimitedEvent

# What was found wrong. A list, since an exception would be raised in the code that logs, which may catch it.
found: list[str] = []


def problems(event: Event, fields: dict[str, object]) -> list[str]:
    """What is wrong with the fields of a record."""
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
    """Check from now on."""
    for kind in (Event, LimitedEvent):
        for name in ("log", "failure"):
            if name in vars(kind):
                setattr(kind, name, _checked(vars(kind)[name]))
