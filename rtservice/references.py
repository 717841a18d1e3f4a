"""Option values `@FILE` and `$VARIABLE`: read the content of a file or of an environment variable."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

# Limit of the size of a file in bytes. A key or password has a few thousand bytes at most.
_LONGEST = 1024 * 1024

_VARIABLE = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class UnresolvedError(Exception):
    """A value cannot be resolved. The text names the option and the file or variable, and contains no value."""


@dataclass(frozen=True)
class OptionValue:
    """One option of a protocol. `referred` values come from a file or a variable, and are never shown."""

    name: str
    text: str = field(repr=False)
    referred: bool = False
    # The path of the file, for error messages; empty for other sources.
    file: str = field(default="", compare=False)


def is_reference(text: str) -> bool:
    """Return whether a value refers to a file or variable, `@/path` or `$NAME`, and so contains no secret."""
    return _VARIABLE.fullmatch(text) is not None or (text[:1] == "@" and text[1:2] not in ("", "@"))


def resolve(option: str, environment: Mapping[str, str], directory: str) -> OptionValue:
    """Return an option such as `password=@/run/secrets/pw` with its resolved value.

    - `@PATH`: the content of a file. A relative path begins in `directory`. One line feed at the end of the file, and a
      carriage return before it, are removed. Bytes that are not UTF-8 become surrogates, as in `os.fsdecode`.
    - `$NAME`: a variable of `environment`.
    - `@@` and `$$` begin a value that begins with `@` or `$`.
    - Any other text is the value.

    Raises UnresolvedError.
    """
    name, _, text = option.partition("=")
    if text.startswith(("@@", "$$")):
        return OptionValue(name, text[1:])
    if text.startswith("@"):
        if text == "@":
            raise UnresolvedError(f"option {name}: no path follows @; write @@ for a value that begins with @")
        try:
            path, content = read_file(text[1:], directory)
        except UnresolvedError as error:
            raise UnresolvedError(f"option {name}: {error}") from None
        return OptionValue(name, content, referred=True, file=path)
    if text.startswith("$"):
        if not _VARIABLE.fullmatch(text):
            raise UnresolvedError(
                f"option {name}: no name of a variable follows $; write $$ for a value that begins with $"
            )
        if text[1:] not in environment:
            raise UnresolvedError(f"option {name}: the environment variable {text[1:]} is not set")
        return OptionValue(name, environment[text[1:]], referred=True)
    return OptionValue(name, text)


def read_file(path: str, directory: str) -> tuple[str, str]:
    """Return the path of a file, from which `resolve` reads a value, and its content. Raises UnresolvedError."""
    path = os.path.normpath(os.path.join(directory, path))
    try:
        # A pipe would block a start or reload, and be empty at the next reload.
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnresolvedError(f"{path!r} is not a regular file")
            content = file.read(_LONGEST + 1)
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
        raise UnresolvedError(f"cannot read the file {path!r}: {problem}") from None
    except ValueError:  # a NUL byte in the path
        raise UnresolvedError(f"{path!r} is not a path: it contains a NUL byte") from None
    if len(content) > _LONGEST:
        raise UnresolvedError(f"the file {path!r} is longer than {_LONGEST} bytes")
    if content.endswith(b"\n"):
        content = content[:-1].removesuffix(b"\r")
    return path, content.decode("utf-8", "surrogateescape")
