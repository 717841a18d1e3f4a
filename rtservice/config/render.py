"""Settings as text: for --print-config, the status page and the reference."""

from __future__ import annotations

from rtservice.config.schema import SHIPPED, TOPICS, Setting, Settings, all_settings
from rtservice.config.sources import LoadedSettings, variable
from rtservice.config.values import PROTOCOL_OPTION, SettingError, as_text
from rtservice.escaping import escaped
from rtservice.hidden import HIDDEN


def shown(setting: Setting, in_force: Settings) -> str:
    """The value of a setting as everybody may see it who can see the service: of options that may be secret, the names.

    It is for people, and not to be read back.
    """
    value = getattr(in_force, setting.field)
    if setting.kind is PROTOCOL_OPTION and in_force.protocol not in SHIPPED:
        return escaped(", ".join(dict.fromkeys(option.partition("=")[0] for option in value)))
    if setting.kind.show is not None and setting.kind is not PROTOCOL_OPTION:
        value = tuple(map(setting.kind.show, value))
    return escaped(as_text(value))


def as_toml(loaded: LoadedSettings) -> str:
    """A TOML file of these settings, each with where it came from; `load_settings` reads the same settings from it.

    Values that may be secret are marked, and `load_settings` does not take the mark: what is printed on a terminal ends
    in logs, tickets and mail. Raises SettingError when a text is not UTF-8, which TOML is.
    """
    lines = []
    open_options = loaded.settings.protocol in SHIPPED
    for setting in all_settings():
        # One file cannot have both.
        if setting.name in ("port", "interface") and loaded.settings.listen:
            continue
        value = getattr(loaded.settings, setting.field)
        comment = loaded.sources[setting.name]
        show = setting.kind.show
        if show is not None and not (setting.kind is PROTOCOL_OPTION and open_options):
            given, value = value, tuple(map(show, value))
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


def reference() -> str:
    """Return the reference of all settings as MyST Markdown: a section for each topic, a directive for each setting.

    Raises KeyError when a setting is in no topic, or a topic has a name that is no setting.
    """
    settings = {setting.name: setting for setting in all_settings()}
    lines = []
    for topic, names in TOPICS.items():
        lines.append(f"## {topic}\n")
        lines += [_described(settings.pop(name)) for name in names]
    if settings:
        raise KeyError(f"in no topic: {', '.join(settings)}")
    return "\n".join(lines)


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
            "",
            f"Command line {option}; environment `{variable(setting.name)}`; file `{setting.name}`. "
            f"A change takes effect after a {setting.takes}.",
            "```",
            "",
        )
    )
