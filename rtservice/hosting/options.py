"""The options of a factory, from the signature of what creates it."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from rtservice.config.values import (
    ESCAPED,
    FLAG,
    TEXT,
    BadValueError,
    Kind,
    SettingError,
    as_text,
    one_of,
    word_for,
)
from rtservice.interfaces import Secret


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


def options_of(maker: Any) -> dict[str, Option]:
    """Return the options of a callable by keyword."""
    return {
        parameter.name: _option(parameter, maker)
        for parameter in _parameters(maker)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def positional_only(maker: Any) -> list[str]:
    """Return the required parameters that cannot be passed by name."""
    return [
        parameter.name
        for parameter in _parameters(maker)
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
    ]


def accepts_any_keyword(maker: Any) -> bool:
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
