"""The output of `--protocol help`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rtservice.config.values import SettingError
from rtservice.hosting.names import ACCEPTED, find, installed_names
from rtservice.hosting.options import options_of


def listing() -> str:
    """Return the names that `--protocol` accepts: a line for each protocol and a line for each of its options."""
    lines = [f"Protocols for --protocol; it also takes package.module:name of a {ACCEPTED}:"]
    for name in installed_names():
        try:
            found = find(name)
            lines.append(f"{name}: {_first_line(found)}")
            lines += [f"    --protocol-option {option}" for option in options_of(found).values()]
        except SettingError as error:
            lines.append(f"{name}: {error}")
    return "".join(f"{line}\n" for line in lines)


def _first_line(found: Any) -> str:
    return next(iter(_docstring_lines(found)), "(no description)")


def _docstring_lines(found: Any) -> Iterator[str]:
    # inspect.getdoc would return the docstring of a base class.
    yield from (line.strip() for line in (found.__doc__ or "").splitlines() if line.strip())
