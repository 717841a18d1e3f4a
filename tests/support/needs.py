"""Marks for tests that need another program."""

import shutil

import pytest


def needs(program: str, package: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if a program is missing, and names the Debian package that has it."""
    missing = shutil.which(program) is None
    return pytest.mark.skipif(missing, reason=f"{program} (Debian: {package}) is not installed")
