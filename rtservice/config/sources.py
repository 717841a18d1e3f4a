"""Load settings: the command line has precedence over the environment, and the environment over the TOML file.

Each error names the source of the value.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rtservice.config.schema import Setting, Settings, all_settings
from rtservice.config.values import OPTION_NAME, Kind, SettingError, as_text
from rtservice.escaping import escaped
from rtservice.suggestions import did_you_mean, nearest
from rtservice.utf8 import NotUTF8Error, decode_utf8


@dataclass(frozen=True)
class LoadedSettings:
    """Settings with the source of each by name: `command line`, `environment`, the path of the file, or `default`."""

    settings: Settings
    sources: Mapping[str, str]

    def where(self, name: str) -> str:
        """Return where a user changes this setting: `--port`, `RTSERVICE_PORT` or `/etc/rt.toml: port`."""
        source = self.sources[name]
        if source in ("command line", "default"):
            return _option(name)
        return variable(name) if source == "environment" else f"{source}: {name}"


_PREFIX = "RTSERVICE_"

# Variables that Kubernetes sets in every container for a Service named rtservice or rtservice-NAME, and Docker for a
# link: addresses, such as RTSERVICE_PORT=tcp://10.0.0.1:8080. No value of a setting looks like that.
_INJECTED = re.compile(
    r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*|PORT=(tcp|udp|sctp)://.*)",
    re.ASCII | re.DOTALL,
)


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return _PREFIX + name.upper().replace("-", "_")


CONFIG_VARIABLE = variable("config")


def _option(name: str) -> str:
    return f"--{name}"


def load_settings(
    command_line: Mapping[str, Any],
    environment: Mapping[str, str],
    config: str | None,
    aliases: Iterable[Setting] = (),
) -> LoadedSettings:
    """Load the settings of the schema and the aliases.

    `command_line` maps the names of settings to texts, and those of repeatable settings to sequences of texts. In the
    environment, variables that begin with `RTSERVICE_` are read, except those that Kubernetes sets; a variable for a
    repeatable setting holds texts separated by white space, or a JSON array of strings. `config` is the path of a TOML
    file, whose keys are the names of settings.

    The command line takes precedence over the environment, that over the file, and that over the defaults. `listen`
    excludes `port` and `interface`: one source may give only one of the two ways, and the source of the highest
    precedence that gives either decides. So do `hub` and `hub-file`, unless they are empty. The options of the protocol
    are collected from all sources; for each option the source of the highest precedence decides. In the file, a table
    `[protocol]` may hold them with the `name` of the protocol.

    Raises SettingError; its text begins with the place of the mistake.
    """
    settings = tuple(all_settings(aliases))
    repeatable = {variable(setting.name) for setting in settings if setting.repeatable}
    variables = {
        name: _texts(name, value) if name in repeatable else value
        for name, value in environment.items()
        if name.startswith(_PREFIX)
        and name != CONFIG_VARIABLE
        and not _INJECTED.fullmatch(f"{name.removeprefix(_PREFIX)}={value}")
    }
    options = {_option(name): text for name, text in command_line.items()}
    layers = [  # the lowest precedence first
        ("environment", _parsed(variables, settings, variable)),
        ("command line", _parsed(options, settings, _option)),
    ]
    if config is not None:
        file = escaped(config)
        layers.insert(0, (file, _parsed(_without_table(_read(config), file), settings, str, prefix=f"{file}: ")))
    values: dict[str, Any] = {}
    sources = {setting.name: "default" for setting in settings}
    for source, given in layers:
        for name in _overridden(given):
            values.pop(name, None)
            sources[name] = "default"
        if "protocol-option" in given:
            given["protocol-option"] = _joined(values.get("protocol-option", ()), given["protocol-option"])
        values |= given
        sources |= dict.fromkeys(given, source)
    own = {setting.field: values[setting.name] for setting in all_settings() if setting.name in values}
    of_aliases = {setting: values.get(setting.name, setting.default) for setting in settings if setting.protocol}
    return LoadedSettings(Settings(**own, aliases=of_aliases), sources)


def _overridden(given: Mapping[str, Any]) -> list[str]:
    """Return the settings of lower sources that do not apply because of those that a source gives."""
    overridden = []
    if given.get("listen"):
        overridden += ["port", "interface"]
    elif "port" in given or "interface" in given:
        overridden.append("listen")
    if given.get("hub"):
        overridden.append("hub-file")
    elif given.get("hub-file"):
        overridden.append("hub")
    return overridden


# An address such as `[::1]:8080`. No JSON array of strings begins like this.
_BRACKETED_ADDRESS = re.compile(r"\s*\[[0-9A-Fa-f]*\\?:")


def _texts(name: str, value: str) -> list[str]:
    """Split the value of a variable: a JSON array of strings, or texts separated by white space. Raises SettingError.

    Quotes and backslashes are ordinary characters in values, so the quoting of a shell is not understood.
    """
    if not value.lstrip().startswith("[") or _BRACKETED_ADDRESS.match(value):
        return value.split()
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError):  # whose text may quote the value
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SettingError(f"{name}: begins with [ but is not a JSON array of strings; the text is not shown")
    return texts


def _joined(lower: tuple[str, ...], higher: tuple[str, ...]) -> tuple[str, ...]:
    """Combine the options of the protocol from two sources; each option comes from the higher source that gives it."""
    names = {_option_name(option) for option in higher}
    return *(option for option in lower if _option_name(option) not in names), *higher


def _option_name(option: str) -> str:
    return option.partition("=")[0].replace("_", "-")


def _without_table(given: dict[str, Any], file: str) -> dict[str, Any]:
    """Return the settings of a file with the table `[protocol]` turned into `protocol` and `protocol-option`."""
    table = given.get("protocol")
    if not isinstance(table, dict):
        return given
    if "protocol-option" in given:
        raise SettingError(f"{file}: protocol-option: cannot be combined with a table [protocol]; give one of them")
    settings = {key: value for key, value in given.items() if key != "protocol"}
    if "name" in table:
        settings["protocol"] = table["name"]
    options = []
    for key, value in table.items():
        if not OPTION_NAME.fullmatch(key):
            raise SettingError(
                f"{file}: protocol: {key!r} is not an option name; accepted are letters, digits, - and _"
            )
        for entry in value if isinstance(value, list) else [value]:
            if type(entry) not in (str, bool, int, float):
                raise SettingError(f"{file}: protocol: {escaped(key)}: {_type(entry)} is not a string or a number")
            options += [f"{key}={as_text(entry)}"] if key != "name" else []
        if value == []:  # the command line has no way to give it
            raise SettingError(f"{file}: protocol: {escaped(key)}: an empty array; give at least one value")
    return {**settings, "protocol-option": options} if options else settings


def _read(config: str) -> dict[str, Any]:
    import tomllib  # workers read no file, and start faster without it

    try:
        # A pipe is empty for a reload, which would then use all defaults; or the reload would wait for a writer.
        with open(config, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return tomllib.loads(decode_utf8(file.read()))
            problem = "is not a regular file; a reload must be able to read it again"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except NotUTF8Error as error:
        problem = str(error)
    # ValueError is tomllib's own error, and that of int() for thousands of digits.
    except (ValueError, RecursionError) as error:
        problem = f"is not TOML: {error}"
    raise SettingError(f"{escaped(config)}: {problem}")


def _parsed(
    given: Mapping[str, Any], known: Sequence[Setting], key_of: Callable[[str], str], *, prefix: str = ""
) -> dict[str, Any]:
    """Return the values that one source gives, by the names of settings. Errors begin with `prefix` and the key."""
    settings = {key_of(setting.name): setting for setting in known}
    values = {}
    for key, value in given.items():
        where = prefix + escaped(key)
        if key not in settings:
            # A prefix that all names share would make them all similar.
            meant = nearest(key.removeprefix(_PREFIX), [setting.name for setting in known])
            raise SettingError(f"{where}: no such setting{did_you_mean(meant and key_of(meant))}")
        try:
            values[settings[key].name] = _value(settings[key], value)
        except ValueError as error:  # also that of str() for an integer of thousands of digits
            raise SettingError(f"{where}: {error}") from None
    for name, other, given_both in (
        ("port", "listen", "port" in values and values.get("listen")),
        ("interface", "listen", "interface" in values and values.get("listen")),
        ("hub-file", "hub", values.get("hub-file") and values.get("hub")),
    ):
        if given_both:
            raise SettingError(f"{prefix}{key_of(name)}: cannot be combined with {key_of(other)}; give one of them")
    return values


def _value(setting: Setting, given: Any) -> Any:
    if not setting.repeatable:
        return _one_value(setting.kind, given)
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list | tuple):
        raise SettingError(f"{_shown(setting.kind, given)} is not {setting.kind.accepts}, or an array of them")
    values = []
    for number, text in enumerate(given, 1):
        try:
            values.append(_one_value(setting.kind, text))
        except SettingError as error:
            if setting.kind.show is None or len(given) == 1:
                raise
            raise SettingError(f"number {number} of {len(given)}: {error}") from None
    return tuple(values)


def _one_value(kind: Kind, given: Any) -> Any:
    if isinstance(given, str):
        return kind.parse(given)
    if type(given) not in kind.toml:
        raise SettingError(f"{_shown(kind, given)} is not {kind.accepts}")
    return kind.parse(as_text(given))


def _shown(kind: Kind, given: Any) -> str:
    """Return a value of a wrong type roughly as TOML writes it, or only its type where the value may be a secret."""
    if kind.show is not None or isinstance(given, list | dict):
        return _type(given)
    return str(given).lower() if isinstance(given, bool) else str(given)


def _type(given: Any) -> str:
    match given:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case list():
            return "an array"
        case dict():
            return "a table"
        case _:
            return "a date or time"
