"""Read the settings again, with the command line, the environment and the file that the process was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rtservice.config.sources import LoadedSettings, load_settings
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.factory import make_factory, resolve_options
from rtservice.references import OptionValue


@dataclass(frozen=True, kw_only=True)
class SettingsSource:
    """Where settings come from. A daemon has changed its directory and its environment when it reloads.

    `given` are the settings of the command line, by name. `file` is the absolute path of the TOML file, or None.
    Files that options of the protocol name are relative to `started_in`, and paths that the protocol itself opens to
    `directory`.
    """

    given: Mapping[str, Any]
    environment: Mapping[str, str]
    file: str | None
    started_in: str
    directory: str

    def read(self) -> LoadedSettings:
        """Return the settings, with what the file contains now. Raises SettingError."""
        return load_settings(dict(self.given), self.environment, self.file, ALIASES)

    def protocol_options(self, loaded: LoadedSettings) -> tuple[OptionValue, ...]:
        """Return the options of the protocol, with what their files contain now. Raises SettingError."""
        return resolve_options(loaded, self.environment, self.started_in)

    def make_factory(self, loaded: LoadedSettings, processes: int = 1) -> Any:
        """Return the factory of these settings, for one of so many processes. Raises SettingError."""
        return make_factory(
            loaded, options=self.protocol_options(loaded), directory=self.directory, processes=processes
        )
