"""Read the settings again, from the command line, the environment and the file of the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtservice.config.sources import LoadedSettings, load_settings
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.factory import make_factory, resolve_options
from rtservice.references import OptionValue
from rtservice.startup.hub_url import hub_url


@dataclass(frozen=True, kw_only=True)
class SettingsSource:
    """The sources of the settings, kept for reloads: a daemon changes its working directory and environment.

    `given` are the settings of the command line, by name. `file` is the absolute path of the TOML file, or None.
    Files of option values (`@FILE`) and of the hub's URL are relative to `started_in`. Paths that the protocol opens
    are relative to `directory`.
    """

    given: Mapping[str, Any]
    environment: Mapping[str, str]
    file: str | None
    started_in: str
    directory: str

    def read(self) -> LoadedSettings:
        """Return the settings, with the current content of the file. Raises SettingError."""
        return load_settings(dict(self.given), self.environment, self.file, ALIASES)

    def protocol_options(self, loaded: LoadedSettings) -> tuple[OptionValue, ...]:
        """Return the options of the protocol, with the current contents of their files. Raises SettingError."""
        return resolve_options(loaded, self.environment, self.started_in)

    def hub_url(self, loaded: LoadedSettings) -> str:
        """Return the URL of the hub, or an empty text, with the current content of its file. Raises SettingError."""
        return hub_url(loaded, self.started_in)

    def make_factory(self, loaded: LoadedSettings, processes: int = 1) -> Any:
        """Return the factory for these settings. `processes` is the number of processes. Raises SettingError."""
        return make_factory(
            loaded, options=self.protocol_options(loaded), directory=self.directory, processes=processes
        )
