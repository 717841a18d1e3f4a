"""Settings of the command: those of the schema, and the aliases of shipped protocols."""

from collections.abc import Mapping
from typing import Any

from rtservice.config.schema import Settings, all_settings
from rtservice.config.sources import LoadedSettings, load_settings
from rtservice.hosting.aliases import ALIASES

SETTINGS = tuple(all_settings(ALIASES))


def load(command_line: Mapping[str, Any], environment: Mapping[str, str], config: str | None) -> LoadedSettings:
    """Load settings as the command does."""
    return load_settings(command_line, environment, config, ALIASES)


def alias(settings: Settings, name: str) -> Any:
    """Return the value of an alias."""
    (value,) = (value for setting, value in settings.aliases.items() if setting.name == name)
    return value


def make_settings(**values: Any) -> Settings:
    """Return settings with these values, and the defaults for all others."""
    of_aliases = {setting: values.pop(setting.field, setting.default) for setting in ALIASES}
    return Settings(**values, aliases=of_aliases)
