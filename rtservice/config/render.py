"""Settings as text: `--print-config`, the status page, and the reference of the documentation."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from rtservice.config.schema import Setting, Settings
from rtservice.config.sources import LoadedSettings, variable
from rtservice.config.values import PROTOCOL_OPTION, SettingError, as_text
from rtservice.escaping import escaped
from rtservice.hidden import HIDDEN


def shown_settings(settings: Settings, open_protocols: Collection[str]) -> dict[str, str]:
    """Return every setting by its name, as clients of the status server may see it.

    Options of the protocol are shown by their names alone, unless it is one of `open_protocols`, which have no secret
    options. The texts are for people and cannot be read back.
    """
    return {
        setting.name: _shown(setting, value, settings.protocol in open_protocols) for setting, value in settings.items()
    }


def _shown(setting: Setting, value: object, open_options: bool) -> str:
    if setting.kind is PROTOCOL_OPTION and isinstance(value, tuple):
        if not open_options:
            return escaped(", ".join(dict.fromkeys(option.partition("=")[0] for option in value)))
    else:
        value = _without_secrets(setting, value)
    return escaped(as_text(value))


def _without_secrets(setting: Setting, value: Any) -> Any:
    show = setting.kind.show
    if show is None:
        return value
    return tuple(map(show, value)) if setting.repeatable else show(value)


def as_toml(loaded: LoadedSettings, open_protocols: Collection[str]) -> str:
    """Return these settings as a TOML file with the source of each; `load_settings` reads the same settings from it.

    A value that may be a secret is replaced by a placeholder, which `load_settings` rejects: what is printed on a
    terminal ends in logs, tickets and mail. `open_protocols` have no secret options. Raises SettingError if a text is
    not UTF-8, which TOML requires.
    """
    lines = []
    open_options = loaded.settings.protocol in open_protocols
    for setting, value in loaded.settings.items():
        # One file cannot have both.
        if setting.name in ("port", "interface") and loaded.settings.listen:
            continue
        comment = loaded.sources[setting.name]
        if not (setting.kind is PROTOCOL_OPTION and open_options):
            given, value = value, _without_secrets(setting, value)
            if value != given:
                comment += f"; {HIDDEN}: may be a secret"
        if setting.repeatable:
            written = f"[{', '.join(map(_toml_string, value))}]"
        elif type(value) in setting.kind.toml:
            written = as_text(value)
        else:
            written = _toml_string(as_text(value))
        lines.append(f"{setting.name} = {written}  # {comment}\n")
    return "".join(lines)


def _toml_string(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingError(f"{text!r} cannot be printed as TOML: it is not UTF-8") from None
    if "\\" in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    characters = (
        f"\\{char}" if char in '"\\' else char if char.isprintable() else f"\\U{ord(char):08x}" for char in text
    )
    return f'"{"".join(characters)}"'


def by_topic(settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Group settings by their topics, in the order of their first settings."""
    topics: dict[str, list[Setting]] = {}
    for setting in settings:
        topics.setdefault(setting.topic, []).append(setting)
    return topics


def reference(settings: Iterable[Setting]) -> str:
    """Return the reference as MyST Markdown: a section for each topic, a directive for each setting."""
    sections = (
        f"## {topic}\n\n" + "\n".join(map(_described, of_topic)) for topic, of_topic in by_topic(settings).items()
    )
    return "\n".join(sections)


def _described(setting: Setting) -> str:
    option = f"`--{setting.name}`" + (f", `-{setting.short}`" if setting.short else "")
    default = as_text(setting.default)
    accepts = f"{setting.kind.accepts}; may be given several times" if setting.repeatable else setting.kind.accepts
    return "\n".join(
        (
            f"```{{confval}} {setting.name}",
            f":type: {accepts}",
            *([f":default: `{default}`"] if default else []),
            "",
            setting.help,
            *(["", setting.details] if setting.details else []),
            "",
            f"Command line {option}; environment `{variable(setting.name)}`; file `{setting.name}`. "
            f"A change takes effect after a {setting.applied_by}.",
            "```",
            "",
        )
    )
