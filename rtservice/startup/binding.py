"""Create the listeners that the settings describe: check them, and bind their sockets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rtservice.config.sources import LoadedSettings
from rtservice.config.values import SettingError
from rtservice.escaping import escaped
from rtservice.hidden import hide_in_description, hide_values, values_in_description
from rtservice.net import listen_types
from rtservice.net.description import TYPES, Description, ListenError, parse, unknown_type
from rtservice.net.listen_conflicts import first_conflict
from rtservice.net.listener import Listener
from rtservice.observe.logfile import check_file
from rtservice.startup.outputs import opening
from rtservice.suggestions import did_you_mean

# Backlog of the listener of --status. At its limit of connections, clients wait for a fraction of a second.
_STATUS_BACKLOG = 1024


def open_listeners(
    loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int
) -> tuple[list[Listener], list[tuple[str, Any]], list[Listener]]:
    """Bind the listeners. Return them, Twisted's endpoints with their descriptions, and the listeners of --status.

    Endpoints are bound later. `slots` is the number of worker slots, or 0 without workers. Raises SettingError.
    """
    served, status = read_listeners(loaded, resolve_path, slots)
    endpoints = [
        (hide_in_description(description), endpoint) for description, endpoint in _other_endpoints(loaded, slots)
    ]
    check_places(served, status)
    opened: list[Listener] = []
    try:
        for setting, listener in served:
            with naming(setting):
                opened += listener.open()
        for setting, listener in status:
            with naming(setting):
                return opened, endpoints, listener.open()
    except BaseException:
        for bound in opened:
            bound.close()
        raise
    return opened, endpoints, []


# Settings, as error messages name them, with their parsed listeners.
_Listeners = list[tuple[str, listen_types.ListenerSpec]]


def read_listeners(
    loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int
) -> tuple[_Listeners, _Listeners]:
    """Parse the listeners of rtservice's types and those of --status, without opening them. Raises SettingError."""
    current = loaded.settings
    served: _Listeners = []
    for description in current.listen:
        with naming(setting := described(loaded, "listen", description)):
            if parse(description).ours:
                listener = listen_types.read_description(
                    description, backlog=current.backlog, resolve_path=resolve_path, slots=slots
                )
                served.append((setting, listener))
    if not current.listen:
        listener = listen_types.read_port(
            current.port, interface=current.interface, backlog=current.backlog, slots=slots
        )
        served.append((_port_and_interface(loaded), listener))
    status: _Listeners = []
    if current.status:
        with naming(setting := described(loaded, "status", current.status)):
            read = parse(current.status)
            if not read.ours:
                raise ListenError(unknown_type(read, proxy=False))
            if read.proxied:
                raise ListenError("the status server does not accept PROXY headers; remove proxy:")
            listener = listen_types.read_description(
                current.status, backlog=_STATUS_BACKLOG, resolve_path=resolve_path, loopback=True
            )
            status.append((setting, listener))
    return served, status


def described(loaded: LoadedSettings, name: str, description: str) -> str:
    """Return a setting and its listen description for error messages, without values that may be secret."""
    return f"{loaded.where(name)} {escaped(hide_in_description(description))}"


def _other_endpoints(loaded: LoadedSettings, slots: int) -> Iterator[tuple[str, Any]]:
    """Yield each description of a type of Twisted or its plugins, with its endpoint. Raises SettingError."""
    for description in loaded.settings.listen:
        with naming(described(loaded, "listen", description)):
            if not parse(description).ours:
                yield description, _other_endpoint(description, slots)


def check_places(served: _Listeners, status: _Listeners, *, look_up: bool = True) -> None:
    """Find conflicts between listeners before any is bound. Raises SettingError."""
    places = []
    for setting, listener in (*served, *status):
        with naming(setting):
            places.append((setting, listener.places(look_up=look_up)))
    if conflict := first_conflict(places):
        raise SettingError(": ".join(conflict))


def check_configuration(loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int) -> None:
    """Find the errors that open_listeners would find, without binding sockets. Raises SettingError."""
    current = loaded.settings
    served, status = read_listeners(loaded, resolve_path, slots)
    for setting, listener in served:
        with naming(setting):
            listener.check()
    for _ in _other_endpoints(loaded, slots):
        pass
    if current.access_log not in ("", "-"):
        with opening(loaded.where("access-log"), current.access_log):
            check_file(resolve_path(current.access_log))
    for setting, listener in status:
        with naming(setting):
            listener.check()
    check_places(served, status)


def _port_and_interface(loaded: LoadedSettings) -> str:
    given = loaded.settings
    interface = f" {loaded.where('interface')} {escaped(given.interface)}" if given.interface else ""
    return f"{loaded.where('port')} {given.port}{interface}"


@contextlib.contextmanager
def naming(setting: str) -> Iterator[None]:
    """Turn a ListenError into a SettingError that names the setting."""
    try:
        yield
    except ListenError as error:
        raise SettingError(f"{setting}: {error}") from None


def check_other_types(loaded: LoadedSettings, slots: int) -> None:
    """Reject descriptions of unknown types, and with workers those of Twisted's types. Raises SettingError."""
    for description in loaded.settings.listen:
        with naming(described(loaded, "listen", description)):
            if not (read := parse(description)).ours:
                _check_other_type(read, slots)


def _check_other_type(description: Description, slots: int) -> None:
    """Check that Twisted or a plugin provides the type of a description. Raises ListenError, also with workers."""
    from twisted.internet.interfaces import IStreamServerEndpointStringParser
    from twisted.plugin import getPlugins

    others = {plugin.prefix for plugin in getPlugins(IStreamServerEndpointStringParser)}
    if description.kind not in others:
        raise ListenError(unknown_type(description, () if slots > 1 else others))
    if slots > 1:
        raise ListenError(f"the type does not support --workers; accepted are {', '.join(sorted(TYPES))}")


def _other_endpoint(description: str, slots: int) -> Any:
    """Return the endpoint of a description of Twisted or of a plugin. Raises ListenError, also with workers."""
    read = parse(description)
    _check_other_type(read, slots)
    if read.kind == "tls" and "".join(read.positional[:1]).isdecimal():
        # A missing directory would be found only when clients connect.
        raise ListenError(f"Twisted's type tls begins with a directory, not with a port{did_you_mean('ssl:…')}")
    from twisted.internet import reactor
    from twisted.internet.endpoints import serverFromString

    try:
        return serverFromString(reactor, description)
    except ImportError as error:
        raise ListenError(f"{error}; an extra of Twisted may be missing (pip install 'twisted[tls]')") from error
    except Exception as error:  # each parser, including those of plugins, raises its own exceptions
        why = hide_values(str(error) or type(error).__name__, values_in_description(description))
        # Twisted's `tls` takes a directory. Most programs use this name for `ssl`.
        hint = did_you_mean("ssl:…" if read.kind == "tls" else None)
        raise ListenError(f"not a usable endpoint description: {why}{hint}") from error
