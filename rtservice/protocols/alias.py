"""How a shipped protocol declares that an option of it is an option of the command line, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """The declaration that `--NAME VALUE` stands for `--protocol-option NAME=VALUE`.

    `name` is an argument of the factory, with `-` for `_`. Type and default are those of the argument; `bounds` limit a
    whole number to a range, both ends included. `help` is one or two short sentences for `--help`; `metavar` stands for
    the value there, if not the usual one of the type.
    """

    name: str
    help: str
    metavar: str = ""
    bounds: tuple[int, int] | None = None
