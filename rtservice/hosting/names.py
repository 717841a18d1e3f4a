"""Names of protocols: shipped, installed, or `package.module:name`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import sys
import types
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IProtocol, IProtocolFactory

from rtservice.config.values import SettingError
from rtservice.escaping import escaped
from rtservice.hosting.error_line import error_line
from rtservice.suggestions import did_you_mean, nearest

# Installed packages offer protocols as entry points of this group.
GROUP = "rtservice.protocols"

# The protocols of this package. None of their options is a secret. They are not entry points: reading those of all
# installed packages would take a tenth of a worker's start.
SHIPPED = {"echo": "rtservice.protocols.echo:EchoFactory", "chat": "rtservice.protocols.chat:ChatFactory"}

ACCEPTED = "Factory class, a function that returns a factory, or a Protocol class"


def installed_names() -> list[str]:
    """Return the names that `--protocol` accepts, shipped protocols first."""
    return [*SHIPPED, *sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)} - SHIPPED.keys())]


def find(name: str) -> Any:
    """Return the object that a name stands for. Raises SettingError."""
    path = SHIPPED.get(name, name)
    if ":" not in path:
        for entry in importlib.metadata.entry_points(group=GROUP, name=name):
            path = entry.value.partition("[")[0].strip()
    module, colon, attributes = path.partition(":")
    if not colon:
        known = f"not one of {', '.join(installed_names())}, nor package.module:name"
        raise SettingError(f"{known}{did_you_mean(_named_or_path(path) or nearest(path, installed_names()))}")
    if not all(part.isidentifier() for part in (*module.split("."), *attributes.split("."))):
        raise SettingError(f"{escaped(path)} is not package.module:name{did_you_mean(_without_file(path))}")
    found: Any = _imported(module, attributes)
    where = module
    for part in attributes.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = nearest(part, _public_names(found))
            meant = near and f"{module}:{f'{where}.{near}'.removeprefix(f'{module}.')}"
            raise SettingError(f"{where} has no attribute {part!r}{did_you_mean(meant)}") from None
        except BaseException as error:  # a property may raise anything
            raise SettingError(f"{where}.{part} cannot be read: {error_line(error)}") from error
        where += f".{part}"
    if not callable(found) or _is_unusable(found):
        raise SettingError(f"{path} is not a {ACCEPTED}")
    return found


def _named_or_path(name: str) -> str | None:
    """Return what a name without a colon may mean: `shout:Shout` for `shout.Shout` or for the path of a file."""
    if (meant := _without_file(name)) is not None:
        return meant
    module, _, attribute = name.rpartition(".")
    return f"{module}:{attribute}" if module and name.replace(".", "").isidentifier() else None


def _without_file(path: str) -> str | None:
    """Return what the path of a file may mean: `shout:Shout` for `./shout.py:Shout`; None if it is no such path."""
    file, _, attributes = path.partition(":")
    module = os.path.basename(file).removesuffix(".py")
    if not (file.endswith(".py") or "/" in file) or not module.isidentifier():
        return None
    return f"{module}:{attributes or 'NAME'}"


def _public_names(found: Any) -> list[str]:
    try:
        return [name for name in dir(found) if not name.startswith("_")]
    except Exception:  # from a __dir__ of the object
        return []


def _near_module(missing: str) -> str | None:
    """Return an existing module of the same package whose name is similar to a missing one, or None."""
    package, dot, name = missing.rpartition(".")
    path = getattr(sys.modules.get(package), "__path__", None) if package else None
    near = nearest(name, sorted(found.name for found in pkgutil.iter_modules(path)))
    return near and f"{package}{dot}{near}"


def _is_unusable(found: Any) -> bool:
    """Return whether it is a class that is neither a factory nor a stream protocol."""
    return isinstance(found, type) and not (is_protocol(found) or _is_factory(found))


def is_protocol(found: Any) -> bool:
    """Return whether it is a protocol class."""
    return isinstance(found, type) and IProtocol.implementedBy(found)


def _is_factory(found: Any) -> bool:
    return IProtocolFactory.implementedBy(found) or hasattr(found, "buildProtocol")


def _imported(module: str, attributes: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise SettingError(f"{module} cannot be imported: {error_line(error)}") from error
        top = module.partition(".")[0]
        here = error.name == top and any(Path(path).exists() for path in (top, f"{top}.py"))
        hint = "; it is in the current directory: set PYTHONPATH=. to find it" if here else ""
        meant = _without_file(f"{module}:{attributes}")
        if meant is None and not here and (near := _near_module(error.name)):
            meant = f"{near}{module.removeprefix(error.name)}:{attributes}"
        raise SettingError(f"there is no module {error.name}{hint}{did_you_mean(meant)}") from None
    except BaseException as error:  # a module may raise anything, SystemExit included
        raise SettingError(f"{module} cannot be imported: {error_line(error)}") from error
