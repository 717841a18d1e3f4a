"""Resolve `--protocol` and its options to a factory. No reactor is needed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal

from twisted.internet.interfaces import IProtocol, IProtocolFactory
from twisted.internet.protocol import Factory

from rtservice import references
from rtservice.config.schema import Setting
from rtservice.config.sources import LoadedSettings
from rtservice.config.values import (
    ESCAPED,
    FLAG,
    TEXT,
    BadValueError,
    Kind,
    SettingError,
    as_text,
    one_of,
    whole_number,
    word_for,
)
from rtservice.escaping import escaped
from rtservice.hidden import hide_values
from rtservice.interfaces import IOneProcess, Secret
from rtservice.protocols.echo import EchoFactory
from rtservice.references import OptionValue, UnresolvedError
from rtservice.suggestions import did_you_mean, nearest
from rtservice.utf8 import NotUTF8Error, decode_utf8

# Installed packages offer protocols as entry points of this group.
GROUP = "rtservice.protocols"

# The protocols of this package. None of their options is a secret. They are not entry points: reading those of all
# installed packages would take a tenth of a worker's start.
SHIPPED = {"echo": "rtservice.protocols.echo:EchoFactory", "chat": "rtservice.protocols.chat:ChatFactory"}


def resolve_options(loaded: LoadedSettings, environment: Mapping[str, str], directory: str) -> tuple[OptionValue, ...]:
    """Return the options of the protocol with the current content of files and variables; see `references.resolve`.

    Raises SettingError.
    """
    try:
        return tuple(references.resolve(option, environment, directory) for option in loaded.settings.protocol_option)
    except UnresolvedError as problem:
        raise SettingError(f"{_where(loaded)}: {problem}") from None


def make_factory(loaded: LoadedSettings, *, options: Iterable[OptionValue], directory: str, processes: int = 1) -> Any:
    """Create the factory that these settings name, for one of `processes` that serve.

    `options` are those of `resolve_options`. Relative paths in their values start in `directory`. Raises SettingError,
    whose text has no value that may be a secret.
    """
    protocol = loaded.settings.protocol
    where = _where(loaded)
    given = list(options)
    for setting, value in loaded.settings.aliases.items():
        if loaded.sources[setting.name] == "default":
            continue
        if setting.protocol != protocol:
            raise SettingError(
                f"{loaded.where(setting.name)}: an option of the protocol {setting.protocol}, and not of {where}"
            )
        given.append(OptionValue(setting.name, as_text(value)))
        # The factory may reject aliases that do not fit together. That error names the first one that it declares.
        where = loaded.where(next(alias.name for alias in loaded.settings.aliases if alias.protocol == protocol))
    try:
        factory = _make(_find(protocol), given, directory, open_values=protocol in SHIPPED)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None
    if processes > 1 and IOneProcess.providedBy(factory):
        raise SettingError(
            f"{where}: this protocol needs all connections in one process; --workers has to be 1, not {processes}"
        )
    return factory


def _where(loaded: LoadedSettings) -> str:
    return f"{loaded.where('protocol')} {escaped(loaded.settings.protocol)}"


def listing() -> str:
    """Return the names that `--protocol` accepts: a line for each protocol and a line for each of its options."""
    lines = [f"rtservice: --protocol is one of these, or package.module:name of a {_ACCEPTED}"]
    for name in _installed():
        try:
            found = _find(name)
            lines.append(f"{name}: {_first_line(found)}")
            lines += [f"    --protocol-option {option}" for option in _options(found).values()]
        except SettingError as error:
            lines.append(f"{name}: {error}")
    return "".join(f"{line}\n" for line in lines)


# --- names ---

_ACCEPTED = "Factory class, a function that returns a factory, or a Protocol class"


def _installed() -> list[str]:
    return [*SHIPPED, *sorted({entry.name for entry in importlib.metadata.entry_points(group=GROUP)} - SHIPPED.keys())]


def _find(name: str) -> Any:
    """Return the object that a name stands for. Raises SettingError."""
    path = SHIPPED.get(name, name)
    if ":" not in path:
        for entry in importlib.metadata.entry_points(group=GROUP, name=name):
            path = entry.value.partition("[")[0].strip()
    module, colon, attributes = path.partition(":")
    if not colon:
        known = f"not one of {', '.join(_installed())}, nor package.module:name"
        raise SettingError(f"{known}{did_you_mean(_named_or_path(path) or nearest(path, _installed()))}")
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
        raise SettingError(f"{path} is not a {_ACCEPTED}")
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
    return isinstance(found, type) and not (_is_protocol(found) or _is_factory(found))


def _is_protocol(found: Any) -> bool:
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


def error_line(error: BaseException) -> str:
    """Return an exception as one line, with the file and line that raised it."""
    text = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError):
        return escaped(f"{text} ({error.filename}, line {error.lineno})")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    # The last frame outside importlib, unless that is this file.
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames and frames[-1].filename != __file__ else ""
    return escaped(" ".join(f"{text}{where}".split()))


# --- options ---


@dataclass(frozen=True)
class Option:
    """A keyword argument of a factory, as users name it. `kind` is None if its type cannot be given as text."""

    name: str
    kind: Kind | None
    annotation: str
    many: type | None = None  # list or tuple, if it may be given several times
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        accepts = self.kind.accepts if self.kind else f"{self.annotation}, cannot be given as text"
        more = ", repeatable" if self.many else ""
        default = "required" if self.required else f"default: {_shown(self.default)}"
        return f"{self.name}=…: {accepts}{more} [{default}]"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, Enum):
        return default.name.lower()
    return as_text(tuple(default) if isinstance(default, list) else default)


def _parameters(maker: Any) -> list[inspect.Parameter]:
    """Return the parameters of a callable; none if it has no signature."""
    try:
        return list(inspect.signature(maker).parameters.values())
    except (TypeError, ValueError):  # some callables written in C
        return []


def _options(maker: Any) -> dict[str, Option]:
    """Return the options of a callable by keyword."""
    return {
        parameter.name: _option(parameter, maker)
        for parameter in _parameters(maker)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _positional_only(maker: Any) -> list[str]:
    """Return the required parameters that cannot be passed by name."""
    return [
        parameter.name
        for parameter in _parameters(maker)
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
    ]


def _accepts_any_keyword(maker: Any) -> bool:
    """Return whether it accepts any keyword."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(maker))


def _option(parameter: inspect.Parameter, maker: Any) -> Option:
    hint = _evaluated(parameter.annotation, maker)
    many = None
    hint = _without_none(hint)
    if hint in (list, tuple):
        hint = list[str] if hint is list else tuple[str, ...]
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (list, Sequence) or (origin is tuple and arguments[1:] == (...,)):
        many = tuple if origin is tuple else list
        hint = arguments[0]
    name = parameter.name.replace("_", "-")
    annotation = getattr(hint, "__name__", str(hint))
    return Option(name, _kind(hint), annotation, many, parameter.default)


def _evaluated(annotation: Any, maker: Any) -> Any:
    if not isinstance(annotation, str):
        return annotation
    function = inspect.unwrap(_called_function(maker))
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except Exception:  # a name that only type checkers import
        return object


def _called_function(maker: Any) -> Any:
    """Return the function that receives the arguments of a callable."""
    if isinstance(maker, type):
        for base in maker.__mro__:
            for name in ("__init__", "__new__"):
                if name in vars(base) and base is not object:
                    return getattr(base, name)
    return maker if hasattr(maker, "__globals__") else getattr(type(maker), "__call__", maker)  # noqa: B004  # not a test


def _without_none(hint: Any) -> Any:
    """Return `X` for `X | None` and for `Annotated[X, …]`, and any other hint unchanged."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [member for member in typing.get_args(hint) if member is not type(None)]
        if len(others) == 1:
            return others[0]
    return hint


def _kind(hint: Any) -> Kind | None:
    """Return the kind of the texts for a parameter of this type, or None if it has none."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return word_for({member.name.lower(): member for member in hint})
    if typing.get_origin(hint) is Literal:
        return one_of(hint)
    try:
        return _KINDS.get(hint)
    except TypeError:  # not hashable, so it is none of them
        return None


def _parse_whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise BadValueError(text, "is not a whole number")
    return int(text)


def _parse_number(text: str) -> float:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?", text):
        raise BadValueError(text, "is not a number")
    return float(text)


def _parse_secret(text: str) -> Secret:
    return Secret(TEXT.parse(text))


def _parse_path(text: str) -> Path:
    if not text:
        raise SettingError("the path is empty")
    return Path(TEXT.parse(text))


_KINDS: dict[Any, Kind] = {
    # An argument without annotation is a text: the type of its default would be a guess.
    inspect.Parameter.empty: TEXT,
    Any: TEXT,
    str: TEXT,
    bytes: ESCAPED,
    int: Kind("a whole number", _parse_whole),
    float: Kind("a number", _parse_number),
    bool: FLAG,
    Path: Kind("a path", _parse_path),
    Secret: Kind("a secret, best given as @/path/to/file or $VARIABLE", _parse_secret),
}


# --- factories ---


def _make(maker: Any, given: Iterable[OptionValue], directory: str, *, open_values: bool) -> Any:
    """Create the factory from a callable; errors show values if `open_values`. Raises SettingError."""
    given = list(given)
    arguments = _arguments(maker, given, directory, open_values)
    if _is_protocol(maker):
        return _HostedProtocol(maker, arguments)
    try:
        factory = maker(**arguments)
    except BaseException as error:
        said = escaped(str(error)) if isinstance(error, ValueError) and str(error) else error_line(error)
        # ValueError means that an argument has an unacceptable value.
        why = said if isinstance(error, ValueError) else f"cannot be created: {said}"
        secrets = [option.text for option in given if option.referred or not open_values]
        raise SettingError(hide_values(why, secrets)) from error
    if not IProtocolFactory.providedBy(factory) and not hasattr(factory, "buildProtocol"):
        raise SettingError(f"returned {type(factory).__name__}, which is not a factory")
    return factory


class _HostedProtocol(Factory[Any]):
    """A factory for a protocol class: each connection gets a protocol with the same arguments."""

    noisy = False

    def __init__(self, protocol: Any, arguments: dict[str, Any]) -> None:
        self.protocol = partial(protocol, **arguments) if arguments else protocol
        self._name = protocol.__name__

    def logPrefix(self) -> str:
        return str(self._name)


def _arguments(maker: Any, given: Iterable[OptionValue], directory: str, open_values: bool) -> dict[str, Any]:
    options = _options(maker)
    accepts_any = _accepts_any_keyword(maker)
    arguments: dict[str, Any] = {}
    for given_option in given:
        name = given_option.name
        keyword = name.replace("-", "_")
        option = options.get(keyword)
        if option is None:
            if not (accepts_any and keyword.isidentifier()):
                known = [option.name for option in options.values()]
                accepted = f"accepted are {', '.join(known)}" if known else "it has no options"
                raise SettingError(f"no option {name!r}; {accepted}{did_you_mean(nearest(name, known))}")
            option = Option(name, TEXT, "")
        if option.kind is None:
            raise SettingError(f"option {name}: its type {option.annotation} cannot be given as text; {_ADVICE}")
        if keyword in arguments and option.many is None:
            raise SettingError(f"option {name} is given twice")
        try:
            value = _value(option.kind, given_option)
        except BadValueError as error:
            problem = str(error) if open_values and not given_option.referred else f"the value {error.problem}"
            raise SettingError(f"option {name}: {problem}") from None
        except SettingError as error:
            raise SettingError(f"option {name}: {error}") from None
        if isinstance(value, Path):
            value = Path(os.path.normpath(os.path.join(directory, value)))
        arguments[keyword] = value if option.many is None else (*arguments.get(keyword, ()), value)
    for parameter in _positional_only(maker):
        raise SettingError(f"its argument {parameter} cannot be passed by name; {_ADVICE}")
    for keyword, option in options.items():
        if option.required and keyword not in arguments:
            raise SettingError(
                f"option {option.name} is missing; accepted is {option.kind.accepts}"
                if option.kind is not None
                else f"its argument {option.name} of the type {option.annotation} cannot be given as text; {_ADVICE}"
            )
    return {keyword: _as_many(options.get(keyword), value) for keyword, value in arguments.items()}


def _value(kind: Kind, given: OptionValue) -> Any:
    """Return the value of an option. Raises SettingError."""
    if not given.referred:
        return kind.parse(given.text)
    if kind is ESCAPED:  # a file holds the bytes without escapes
        return given.text.encode("utf-8", "surrogateescape")
    try:
        text = decode_utf8(given.text.encode("utf-8", "surrogateescape"))
    except NotUTF8Error as error:
        raise BadValueError(given.text, f"of {given.file!r} {error}" if given.file else str(error)) from None
    return kind.parse(text)


_ADVICE = "name a function that returns the factory"


def _as_many(option: Option | None, value: Any) -> Any:
    return option.many(value) if option is not None and option.many is not None else value


def _first_line(found: Any) -> str:
    return next(iter(_docstring_lines(found)), "(no description)")


def _docstring_lines(found: Any) -> Iterator[str]:
    # inspect.getdoc would return the docstring of a base class.
    yield from (line.strip() for line in (found.__doc__ or "").splitlines() if line.strip())


# --- aliases ---


def _aliases(protocol: str, factory: Any) -> Iterator[Setting]:
    """Yield the settings that a factory declares as aliases of options of the protocol."""
    options = _options(factory)
    for alias in factory.aliases:
        option = options[alias.name.replace("-", "_")]
        kind = option.kind if alias.bounds is None else whole_number(*alias.bounds)
        assert kind is not None
        yield Setting(
            name=alias.name,
            topic=f"The {protocol} protocol",
            kind=kind,
            default=option.default,
            help=alias.help,
            metavar=alias.metavar or kind.metavar,
            protocol=protocol,
        )


# Only shipped protocols have aliases. The options of the command line are declared before it is parsed, and any other
# protocol is imported after that, with workers even in another process. And a package that happens to be installed must
# not add options to the command.
ALIASES = tuple(_aliases("echo", EchoFactory))
