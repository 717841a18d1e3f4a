"""Programs that tests run in other processes."""

import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent


def program(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a program of this directory."""
    return [sys.executable, str(PROGRAMS / f"{name}.py"), *arguments]
