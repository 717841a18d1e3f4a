"""Fixture: a configuration file."""

import pytest


@pytest.fixture
def config(tmp_path):
    """Write a TOML file, and return its path."""

    def write(content: str | bytes) -> str:
        path = tmp_path / "rt.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write
