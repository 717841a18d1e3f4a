"""Modules for tests to host, in tests/hosted, and Twisted endpoint plugins, in tests/hosted/plugins."""

import shutil
from pathlib import Path

HOSTED = Path(__file__).parents[1] / "hosted"


def copy_hosted(name: str, directory: Path) -> Path:
    """Copy a module into a directory, and return the path of the copy."""
    return Path(shutil.copy(HOSTED / f"{name}.py", directory))


def copy_plugin(name: str, directory: Path) -> None:
    """Copy a plugin to where Twisted finds it if the directory is on the Python path."""
    plugins = directory / "twisted" / "plugins"
    plugins.mkdir(parents=True)
    shutil.copy(HOSTED / "plugins" / f"{name}.py", plugins)
