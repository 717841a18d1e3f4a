"""The URL of the hub: from `--hub`, or from the file of `--hub-file`."""

from __future__ import annotations

from rtservice.config.sources import LoadedSettings
from rtservice.config.values import HUB_URL, SettingError
from rtservice.events import HUB_PASSWORD_VISIBLE
from rtservice.hub.carrier import Carrier
from rtservice.hub.choice import make_carrier
from rtservice.hub.redis_url import BadHubURL, parse_hub_url
from rtservice.observe.logs import Log
from rtservice.references import UnresolvedError, read_file


def hub_url(loaded: LoadedSettings, directory: str) -> str:
    """Return the URL of the hub, or an empty text. Reads the file of `--hub-file`. Raises SettingError.

    A relative path of the file starts in `directory`.
    """
    file = loaded.settings.hub_file
    if not file:
        return loaded.settings.hub
    where = loaded.where("hub-file")
    try:
        path, content = read_file(file, directory)
    except UnresolvedError as error:
        raise SettingError(f"{where}: {error}") from None
    url = content.strip()
    if not url:
        raise SettingError(f"{where}: the file {path!r} is empty; it must contain the URL of the hub")
    try:
        HUB_URL.parse(url)
    except SettingError as error:
        raise SettingError(f"{where}: the file {path!r}: {error}") from None
    return url


def carrier_of_process(loaded: LoadedSettings, url: str, log: Log) -> Carrier:
    """Return the carrier of the hub of a single process. Raises SettingError if the URL cannot be used.

    With workers, the result is a check of what their hubs need.
    """
    try:
        return make_carrier(url, log)
    except BadHubURL as error:
        raise SettingError(f"{loaded.where('hub-file' if loaded.settings.hub_file else 'hub')}: {error}") from None


def warn_of_visible_password(loaded: LoadedSettings, log: Log) -> None:
    """Log a warning if the command line contains a password of the hub."""
    if loaded.settings.hub and loaded.sources["hub"] == "command line":
        parsed = parse_hub_url(loaded.settings.hub)
        if parsed.login is not None or parsed.sentinel_login is not None:
            HUB_PASSWORD_VISIBLE.log(log)
