"""Create the factory of `--protocol` from the texts of its options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory

from rtservice import references
from rtservice.config.sources import LoadedSettings
from rtservice.config.values import ESCAPED, TEXT, BadValueError, Kind, SettingError, as_text
from rtservice.escaping import escaped
from rtservice.hidden import hide_values
from rtservice.hosting.error_line import error_line
from rtservice.hosting.names import SHIPPED, find, is_protocol
from rtservice.hosting.options import Option, accepts_any_keyword, options_of, positional_only
from rtservice.interfaces import IOneProcess
from rtservice.references import OptionValue, UnresolvedError
from rtservice.suggestions import did_you_mean, nearest
from rtservice.utf8 import NotUTF8Error, decode_utf8


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
        factory = _make(find(protocol), given, directory, open_values=protocol in SHIPPED)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None
    if processes > 1 and IOneProcess.providedBy(factory):
        raise SettingError(
            f"{where}: this protocol needs all connections in one process; --workers has to be 1, not {processes}"
        )
    return factory


def _where(loaded: LoadedSettings) -> str:
    return f"{loaded.where('protocol')} {escaped(loaded.settings.protocol)}"


def _make(maker: Any, given: Iterable[OptionValue], directory: str, *, open_values: bool) -> Any:
    """Create the factory from a callable; errors show values if `open_values`. Raises SettingError."""
    given = list(given)
    arguments = _arguments(maker, given, directory, open_values)
    if is_protocol(maker):
        return _HostedProtocol(maker, arguments)
    try:
        factory = maker(**arguments)
    except BaseException as error:
        said = escaped(str(error)) if isinstance(error, ValueError) and str(error) else error_line(error)
        # ValueError means that an argument has an unacceptable value.
        why = said if isinstance(error, ValueError) else f"cannot be created: {said}"
        texts = [option.text for option in given if option.referred or not open_values]
        # An exception may contain a value or its repr(). The text of the exception is escaped, or joined to one line.
        forms = (form for text in texts for form in (text, " ".join(text.split()), repr(text)[1:-1]))
        secrets = [variant for form in forms for variant in (form, escaped(form))]
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
    options = options_of(maker)
    accepts_any = accepts_any_keyword(maker)
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
    for parameter in positional_only(maker):
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
