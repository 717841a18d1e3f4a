"""Long work in short steps: a generator that yields between them, and returns the result."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

_Result = TypeVar("_Result")
# Work that takes long with many files, in steps of a few milliseconds (at most one certificate), between which the
# reactor handles other events. The generator returns the result.
Steps: TypeAlias = Generator[None, None, _Result]


def finish(steps: Steps[_Result]) -> _Result:
    """Run all steps, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result
