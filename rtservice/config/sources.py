"""Where settings come from: the command line, the environment and a TOML file, in this order of precedence.

Each error names the source of the value.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rtservice.config.schema import Setting, Settings, all_settings
from rtservice.config.values import OPTION_NAME, Kind, SettingError, as_text
from rtservice.escaping import escaped
from rtservice.suggestions import did_you_mean, nearest
from rtservice.utf8 import NotUTF8Error, decode_utf8


@dataclass(frozen=True)
class LoadedSettings:
    """The settings in force, and by name where each came from.

    That is `command line`, `environment`, the file's name, or `default`.
    """

    settings: Settings
    sources: Mapping[str, str]

    def where(self, name: str) -> str:
        """What a user would change a setting at, as errors begin: `--port`, `RTSERVICE_PORT`, `/etc/rt.toml: port`."""
        source = self.sources[name]
        if source in ("command line", "default"):
            return _option(name)
        return variable(name) if source == "environment" else f"{source}: {name}"


_PREFIX = "RTSERVICE_"

# What Kubernetes puts into every container for a Service called rtservice, or rtservice-something, and Docker for a
# link: addresses, one as RTSERVICE_PORT=tcp://10.0.0.1:8080. Nobody has set that, and no setting looks like it.
_INJECTED = re.compile(
    r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*|PORT=(tcp|udp|sctp)://.*)",
    re.ASCII | re.DOTALL,
)


def variable(name: str) -> str:
    """The environment's variable of a setting."""
    return _PREFIX + name.upper().replace("-", "_")


CONFIG_VARIABLE = variable("config")


def _option(name: str) -> str:
    return f"--{name}"


def load_settings(
    command_line: Mapping[str, Any], environment: Mapping[str, str], config: str | None
) -> LoadedSettings:
    """The settings: the command line's over the environment's over those of the TOML file `config` over the defaults.

    The command line maps settings' names to texts, and of repeatable settings to sequences of them. Of the environment
    the `RTSERVICE_` variables count, but for what Kubernetes makes of a Service of that name; a repeatable setting's
    holds texts with white space between them, or a JSON array of strings. The file's keys are the settings' names.

    `listen` and `port` with `interface` both say where to listen: one layer gives one of them, and the highest layer
    that gives any is followed. The options of a protocol are those of all layers, each the highest one's. A table
    `[protocol]` in the file has them, and the protocol's `name`.

    Raises SettingError, whose text begins with where the mistake is.
    """
    repeatable = {variable(setting.name) for setting in all_settings() if setting.repeatable}
    variables = {
        name: _texts(name, value) if name in repeatable else value
        for name, value in environment.items()
        if name.startswith(_PREFIX)
        and name != CONFIG_VARIABLE
        and not _INJECTED.fullmatch(f"{name.removeprefix(_PREFIX)}={value}")
    }
    options = {_option(name): text for name, text in command_line.items()}
    layers = [
        ("environment", _parsed(variables, variable)),
        ("command line", _parsed(options, _option)),
    ]
    if config is not None:
        file = escaped(config)
        layers.insert(0, (file, _parsed(_without_table(_read(config), file), str, prefix=f"{file}: ")))
    values: dict[str, Any] = {}
    sources = {setting.name: "default" for setting in all_settings()}
    for source, given in layers:
        if given.get("listen"):
            beaten = ["port", "interface"]
        elif "port" in given or "interface" in given:
            beaten = ["listen"]
        else:
            beaten = []
        for name in beaten:
            values.pop(name, None)
            sources[name] = "default"
        if "protocol-option" in given:
            given["protocol-option"] = _joined(values.get("protocol-option", ()), given["protocol-option"])
        values |= given
        sources |= dict.fromkeys(given, source)
    return LoadedSettings(Settings(**{name.replace("-", "_"): value for name, value in values.items()}), sources)


# What a JSON array of strings cannot begin with.
_BRACKETED_ADDRESS = re.compile(r"\s*\[[0-9A-Fa-f]*\\?:")


def _texts(name: str, value: str) -> list[str]:
    """The texts of a variable that holds several: a JSON array of strings, or texts with white space between them.

    JSON, and not the quotes of a shell: these are in use, and so are backslashes, and nothing that begins with [ was
    right before, but for an IPv6 address in brackets.
    """
    if not value.lstrip().startswith("[") or _BRACKETED_ADDRESS.match(value):
        return value.split()
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError):  # whose text may have some of the value
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SettingError(f"{name}: begins with [ and is not a JSON array of strings; the text is not shown")
    return texts


def _joined(lower: tuple[str, ...], higher: tuple[str, ...]) -> tuple[str, ...]:
    """Options of a protocol from two layers."""
    names = {_option_name(option) for option in higher}
    return *(option for option in lower if _option_name(option) not in names), *higher


def _option_name(option: str) -> str:
    return option.partition("=")[0].replace("_", "-")


def _without_table(given: dict[str, Any], file: str) -> dict[str, Any]:
    """A file's settings with what a table `[protocol]` says as `protocol` and `protocol-option`."""
    table = given.get("protocol")
    if not isinstance(table, dict):
        return given
    if "protocol-option" in given:
        raise SettingError(f"{file}: protocol-option: [protocol] has the options already; give one of them")
    settings = {key: value for key, value in given.items() if key != "protocol"}
    if "name" in table:
        settings["protocol"] = table["name"]
    options = []
    for key, value in table.items():
        if not OPTION_NAME.fullmatch(key):
            raise SettingError(f"{file}: protocol: {key!r} is not an option's name")
        for one in value if isinstance(value, list) else [value]:
            if type(one) not in (str, bool, int, float):
                raise SettingError(f"{file}: protocol: {escaped(key)}: {_type(one)} is not a string or a number")
            options += [f"{key}={as_text(one)}"] if key != "name" else []
        if value == []:  # which the command line could not say either
            raise SettingError(f"{file}: protocol: {escaped(key)}: an array without anything in it")
    return {**settings, "protocol-option": options} if options else settings


def _read(config: str) -> dict[str, Any]:
    import tomllib  # no worker reads a file

    try:
        # A pipe would give nothing to a reload, and so the defaults to everything, or keep the whole service waiting.
        with open(config, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return tomllib.loads(decode_utf8(file.read()))
            problem = "is not a regular file, which a reload could read again"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except NotUTF8Error as error:
        problem = str(error)
    # tomllib's own error is a ValueError; int() has another for thousands of digits, and arrays may nest too deeply.
    except (ValueError, RecursionError) as error:
        problem = f"is not TOML: {error}"
    raise SettingError(f"{escaped(config)}: {problem}")


def _parsed(given: Mapping[str, Any], key_of: Callable[[str], str], *, prefix: str = "") -> dict[str, Any]:
    """The values of one layer by settings' names; errors begin with `prefix` and the key."""
    settings = {key_of(setting.name): setting for setting in all_settings()}
    values = {}
    for key, value in given.items():
        where = prefix + escaped(key)
        if key not in settings:
            # Without what all keys of a layer share, which would make them all alike.
            meant = nearest(key.removeprefix(_PREFIX), [setting.name for setting in all_settings()])
            raise SettingError(f"{where}: no such setting{did_you_mean(meant and key_of(meant))}")
        try:
            values[settings[key].name] = _value(settings[key], value)
        except ValueError as error:  # also Python's own, of an integer that is too long to be shown
            raise SettingError(f"{where}: {error}") from None
    if values.get("listen"):
        for name in ("port", "interface"):
            if name in values:
                raise SettingError(
                    f"{prefix}{key_of(name)}: {key_of('listen')} says already where to listen; give one of them"
                )
    return values


def _value(setting: Setting, given: Any) -> Any:
    if not setting.repeatable:
        return _one_value(setting.kind, given)
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list | tuple):
        raise SettingError(f"{_shown(setting.kind, given)} is not {setting.kind.accepts} or an array of such")
    values = []
    for number, one in enumerate(given, 1):
        try:
            values.append(_one_value(setting.kind, one))
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
    """A value of another type as TOML has it, near enough; only its type where that may be a secret."""
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
