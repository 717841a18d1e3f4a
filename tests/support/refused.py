"""Check that a command fails with one error line."""

from typing import Any


def assert_refused(result: Any, *words: str) -> None:
    """Check that a command failed without a traceback, and with one error line that contains these words."""
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word in line
