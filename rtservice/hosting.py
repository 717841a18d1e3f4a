"""Resolve `--protocol` and the texts of its options to a factory. No reactor is needed."""

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
from rtservice.config.schema import SHIPPED
from rtservice.config.sources import LoadedSettings
from rtservice.config.values import ESCAPED, FLAG, TEXT, BadValueError, Kind, SettingError, as_text
from rtservice.escaping import escaped
from rtservice.hidden import hide_values
from rtservice.interfaces import IOneProcess, Secret
from rtservice.references import OptionValue, UnresolvedError
from rtservice.suggestions import did_you_mean, nearest
from rtservice.utf8 import NotUTF8Error, decode_utf8

# Entry points of this group have names under which installed packages offer their protocols.
GROUP = "rtservice.protocols"

# Options of the echo exchange that are settings of their own, too.
ECHO_SETTINGS = ("greeting", "greet", "framing", "max-message")


def resolve_options(loaded: LoadedSettings, environment: Mapping[str, str], directory: str) -> tuple[OptionValue, ...]:
    """The options of the protocol with what their files and variables hold now; see `references.resolve`.

    Raises SettingError.
    """
    try:
        return tuple(references.resolve(one, environment, directory) for one in loaded.settings.protocol_option)
    except UnresolvedError as problem:
        raise SettingError(f"{_where(loaded)}: {problem}") from None


def make_factory(loaded: LoadedSettings, *, options: Iterable[OptionValue], directory: str, processes: int = 1) -> Any:
    """The factory of these settings, for one of so many processes that serve.

    `options` are those of `resolve_options`. Relative paths among their values begin in `directory`. Raises
    SettingError, with no value of an option that may be a secret.
    """
    wanted = loaded.settings
    where = _where(loaded)
    given = list(options)
    for name in ECHO_SETTINGS:
        if loaded.sources[name] == "default":
            continue
        if wanted.protocol != "echo":
            raise SettingError(f"{loaded.where(name)}: an option of the protocol echo, and not of {where}")
        given.append(OptionValue(name, as_text(getattr(wanted, name.replace("-", "_")))))
        where = loaded.where("greeting")  # what else is wrong with them, together, is wrong with the greeting
    try:
        factory = _make(_find(wanted.protocol), given, directory, open_values=wanted.protocol in SHIPPED)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None
    if processes > 1 and IOneProcess.providedBy(factory):
        raise SettingError(
            f"{where}: its connections have to be in one process: --workers has to be 1, not {processes}"
        )
    return factory


def _where(loaded: LoadedSettings) -> str:
    return f"{loaded.where('protocol')} {escaped(loaded.settings.protocol)}"


def listing() -> str:
    """What can be named, with a line for each and a line for each option."""
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
    """What a name stands for. Raises SettingError."""
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
            raise SettingError(f"there is no {part!r} in {where}{did_you_mean(meant)}") from None
        except BaseException as error:  # a property of theirs
            raise SettingError(f"{where}.{part} cannot be had: {told(error)}") from error
        where += f".{part}"
    if not callable(found) or _is_no_stream(found):
        raise SettingError(f"{path} is not a {_ACCEPTED}")
    return found


def _named_or_path(name: str) -> str | None:
    """What a name without a colon may have been meant as: `shout:Shout` for `shout.Shout` or for a file's path."""
    if (meant := _without_file(name)) is not None:
        return meant
    module, _, attribute = name.rpartition(".")
    return f"{module}:{attribute}" if module and name.replace(".", "").isidentifier() else None


def _without_file(path: str) -> str | None:
    """The module and the name that were meant by a file's path: `shout:Shout` for `./shout.py:Shout`."""
    file, _, attributes = path.partition(":")
    module = os.path.basename(file).removesuffix(".py")
    if not (file.endswith(".py") or "/" in file) or not module.isidentifier():
        return None
    return f"{module}:{attributes or 'NAME'}"


def _public_names(found: Any) -> list[str]:
    try:
        return [name for name in dir(found) if not name.startswith("_")]
    except Exception:  # a __dir__ of theirs
        return []


def _near_module(missing: str) -> str | None:
    """A module beside the place of one that does not exist, with a similar name."""
    package, dot, name = missing.rpartition(".")
    path = getattr(sys.modules.get(package), "__path__", None) if package else None
    near = nearest(name, sorted(found.name for found in pkgutil.iter_modules(path)))
    return near and f"{package}{dot}{near}"


def _is_no_stream(found: Any) -> bool:
    """Whether it is a class, and can be seen to be neither a factory nor a protocol of streams."""
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
            raise SettingError(f"{module} cannot be imported: {told(error)}") from error
        top = module.partition(".")[0]
        here = error.name == top and any(Path(path).exists() for path in (top, f"{top}.py"))
        hint = "; it is in the current directory, where PYTHONPATH=. has it found" if here else ""
        meant = _without_file(f"{module}:{attributes}")
        if meant is None and not here and (near := _near_module(error.name)):
            meant = f"{near}{module.removeprefix(error.name)}:{attributes}"
        raise SettingError(f"there is no module {error.name}{hint}{did_you_mean(meant)}") from None
    except BaseException as error:  # whatever a module does when it is imported, sys.exit() included
        raise SettingError(f"{module} cannot be imported: {told(error)}") from error


def told(error: BaseException) -> str:
    """An exception in one line, with where it was raised."""
    text = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError):
        return escaped(f"{text} ({error.filename}, line {error.lineno})")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    # In a file of theirs, if there is one on the way.
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames and frames[-1].filename != __file__ else ""
    return escaped(" ".join(f"{text}{where}".split()))


# --- options ---


@dataclass(frozen=True)
class Option:
    """A keyword argument, as users name and type it; `kind` is None for what no text can be."""

    name: str
    kind: Kind | None
    annotation: str
    many: type | None = None  # list or tuple, of one for each time that it is given
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.default is inspect.Parameter.empty

    def __str__(self) -> str:
        accepts = self.kind.accepts if self.kind else f"{self.annotation}, which no text can be"
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
    """What something is called with, as far as it says."""
    try:
        return list(inspect.signature(maker).parameters.values())
    except (TypeError, ValueError):  # some that are written in C
        return []


def _options(maker: Any) -> dict[str, Option]:
    """The options of something that is called with keywords, by keyword."""
    return {
        parameter.name: _option(parameter, maker)
        for parameter in _parameters(maker)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _nameless(maker: Any) -> list[str]:
    """What it has to be given, and not by a name."""
    return [one.name for one in _parameters(maker) if one.kind is one.POSITIONAL_ONLY and one.default is one.empty]


def _takes_any(maker: Any) -> bool:
    """Whether it takes keywords that it does not name."""
    return any(one.kind is one.VAR_KEYWORD for one in _parameters(maker))


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
    function = inspect.unwrap(_called(maker))
    try:
        return eval(annotation, getattr(function, "__globals__", {}))
    except Exception:  # a name that is there for type checkers alone
        return object


def _called(maker: Any) -> Any:
    """The function that is called with the arguments of something that is called."""
    if isinstance(maker, type):
        for one in maker.__mro__:
            for name in ("__init__", "__new__"):
                if name in vars(one) and one is not object:
                    return getattr(one, name)
    return maker if hasattr(maker, "__globals__") else getattr(type(maker), "__call__", maker)  # noqa: B004  # its function


def _without_none(hint: Any) -> Any:
    """`X` of an `X | None`, which is None when it is not given, and of an annotated X."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [one for one in typing.get_args(hint) if one is not type(None)]
        if len(others) == 1:
            return others[0]
    return hint


def _kind(hint: Any) -> Kind | None:
    """What a text has to be for a parameter of this type."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _words({member.name.lower(): member for member in hint})
    if typing.get_origin(hint) is Literal:
        return _words({as_text(value): value for value in typing.get_args(hint)})
    try:
        return _KINDS.get(hint)
    except TypeError:  # not hashable, and so none of them
        return None


def _words(values: dict[str, Any]) -> Kind:
    accepts = f"one of {', '.join(values)}"

    def parse(text: str) -> Any:
        if text not in values:
            raise BadValueError(text, f"is not {accepts}")
        return values[text]

    return Kind(accepts, parse)


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
    # An argument of which nothing is said is a text: the type of its default would be a guess.
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
    """A factory by what a name stands for; errors show values if they are open. Raises SettingError."""
    given = list(given)
    arguments = _arguments(maker, given, directory, open_values)
    if _is_protocol(maker):
        return _HostedProtocol(maker, arguments)
    try:
        factory = maker(**arguments)
    except BaseException as error:
        said = escaped(str(error)) if isinstance(error, ValueError) and str(error) else told(error)
        # ValueError is how Python says that an argument is not acceptable.
        why = said if isinstance(error, ValueError) else f"it cannot be made: {said}"
        secrets = [one.text for one in given if one.referred or not open_values]
        raise SettingError(hide_values(why, secrets)) from error
    if not IProtocolFactory.providedBy(factory) and not hasattr(factory, "buildProtocol"):
        raise SettingError(f"it gives no factory, but {type(factory).__name__}")
    return factory


class _HostedProtocol(Factory[Any]):
    """Makes a protocol of a class, with the same arguments for each connection."""

    noisy = False

    def __init__(self, protocol: Any, arguments: dict[str, Any]) -> None:
        self.protocol = partial(protocol, **arguments) if arguments else protocol
        self._name = protocol.__name__

    def logPrefix(self) -> str:
        return str(self._name)


def _arguments(maker: Any, given: Iterable[OptionValue], directory: str, open_values: bool) -> dict[str, Any]:
    options = _options(maker)
    takes_any = _takes_any(maker)
    arguments: dict[str, Any] = {}
    for one in given:
        name = one.name
        keyword = name.replace("-", "_")
        option = options.get(keyword)
        if option is None:
            if not (takes_any and keyword.isidentifier()):
                known = [one.name for one in options.values()]
                raise SettingError(f"no option {name!r}; {_what_there_is(options)}{did_you_mean(nearest(name, known))}")
            option = Option(name, TEXT, "")
        if option.kind is None:
            raise SettingError(f"option {name}: it is {option.annotation}, which no text can be; {_ADVICE}")
        if keyword in arguments and option.many is None:
            raise SettingError(f"option {name} is given twice")
        try:
            value = _value(option.kind, one)
        except BadValueError as error:
            problem = str(error) if open_values and not one.referred else f"the value {error.problem}"
            raise SettingError(f"option {name}: {problem}") from None
        except SettingError as error:
            raise SettingError(f"option {name}: {error}") from None
        if isinstance(value, Path):
            value = Path(os.path.normpath(os.path.join(directory, value)))
        arguments[keyword] = value if option.many is None else (*arguments.get(keyword, ()), value)
    for parameter in _nameless(maker):
        raise SettingError(f"it needs {parameter}, which cannot be given by its name; {_ADVICE}")
    for keyword, option in options.items():
        if option.required and keyword not in arguments:
            raise SettingError(
                f"option {option.name} is missing, {option.kind.accepts}"
                if option.kind is not None
                else f"it needs {option.name}, which no text can be: {option.annotation}; {_ADVICE}"
            )
    return {keyword: _as_many(options.get(keyword), value) for keyword, value in arguments.items()}


def _value(kind: Kind, given: OptionValue) -> Any:
    """Raises SettingError."""
    if not given.referred:
        return kind.parse(given.text)
    if kind is ESCAPED:  # a file of bytes has them as they are
        return given.text.encode("utf-8", "surrogateescape")
    try:
        text = decode_utf8(given.text.encode("utf-8", "surrogateescape"))
    except NotUTF8Error as error:
        raise BadValueError(given.text, f"of {given.file!r} {error}" if given.file else str(error)) from None
    return kind.parse(text)


_ADVICE = "name a function that returns the factory"


def _as_many(option: Option | None, value: Any) -> Any:
    return option.many(value) if option is not None and option.many is not None else value


def _what_there_is(options: dict[str, Option]) -> str:
    return f"it has {', '.join(one.name for one in options.values())}" if options else "it has none"


def _first_line(found: Any) -> str:
    return next(iter(_docstring_lines(found)), "(it says nothing about itself)")


def _docstring_lines(found: Any) -> Iterator[str]:
    # Not inspect.getdoc, which gives that of a base class.
    yield from (line.strip() for line in (found.__doc__ or "").splitlines() if line.strip())
