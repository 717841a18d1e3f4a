"""A command that is refused with one line."""

from typing import Any


def assert_refused(result: Any, *words: str) -> None:
    """Check that a command failed with one line on its standard error, which has these words, and no traceback."""
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word in line
