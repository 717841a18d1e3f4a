"""Listeners from settings: find what is wrong with them, and bind their sockets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rtservice.config.sources import LoadedSettings
from rtservice.config.values import SettingError, printable
from rtservice.hidden import hide_in_description, hide_values, values_in_description
from rtservice.net import listeners
from rtservice.net.description import TYPES, Description, ListenError, parse, unknown_type
from rtservice.net.listener import Listener
from rtservice.net.places import first_conflict
from rtservice.observe.logfile import check_file
from rtservice.startup.outputs import opening
from rtservice.suggestions import did_you_mean

# Of a listener of --status, whose clients wait for a fraction of a second when there are many.
_STATUS_BACKLOG = 1024


def open_listeners(
    loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int
) -> tuple[list[Listener], list[tuple[str, Any]], list[Listener]]:
    """Every listener, bound, the endpoints that can only be bound later, and the listeners of --status.

    Raises SettingError.
    """
    wanted, status = read_listeners(loaded, resolve_path, slots)
    endpoints = [
        (hide_in_description(description), endpoint) for description, endpoint in _other_endpoints(loaded, slots)
    ]
    check_places(wanted, status)
    opened: list[Listener] = []
    try:
        for setting, one in wanted:
            with naming(setting):
                opened += one.open()
        for setting, one in status:
            with naming(setting):
                return opened, endpoints, one.open()
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened, endpoints, []


# Settings, as errors begin, with what they want to listen on.
_Listeners = list[tuple[str, listeners.Wanted]]


def read_listeners(
    loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int
) -> tuple[_Listeners, _Listeners]:
    """What is to be listened on by this package, and for --status, with nothing opened. Raises SettingError."""
    in_force = loaded.settings
    wanted: _Listeners = []
    for description in in_force.listen:
        with naming(setting := described(loaded, "listen", description)):
            if parse(description).ours:
                one = listeners.read_description(
                    description, backlog=in_force.backlog, resolve_path=resolve_path, slots=slots
                )
                wanted.append((setting, one))
    if not in_force.listen:
        one = listeners.read_port(in_force.port, interface=in_force.interface, backlog=in_force.backlog, slots=slots)
        wanted.append((_port_and_interface(loaded), one))
    status: _Listeners = []
    if in_force.status:
        with naming(setting := described(loaded, "status", in_force.status)):
            read = parse(in_force.status)
            if not read.ours:
                raise ListenError(unknown_type(read, proxy=False))
            if read.proxied:
                raise ListenError("the status server takes no PROXY headers; leave proxy: out")
            one = listeners.read_description(
                in_force.status, backlog=_STATUS_BACKLOG, resolve_path=resolve_path, loopback=True
            )
            status.append((setting, one))
    return wanted, status


def described(loaded: LoadedSettings, name: str, description: str) -> str:
    return f"{loaded.where(name)} {printable(hide_in_description(description))}"


def _other_endpoints(loaded: LoadedSettings, slots: int) -> Iterator[tuple[str, Any]]:
    """The descriptions that are Twisted's or a plugin's to understand, with their endpoints. Raises SettingError."""
    for description in loaded.settings.listen:
        with naming(described(loaded, "listen", description)):
            if not parse(description).ours:
                yield description, _other_endpoint(description, slots)


def check_places(wanted: _Listeners, status: _Listeners, *, look_up: bool = True) -> None:
    """Find two listeners that exclude each other, before any is bound. Raises SettingError."""
    places = []
    for setting, one in (*wanted, *status):
        with naming(setting):
            places.append((setting, one.places(look_up=look_up)))
    if conflict := first_conflict(places):
        raise SettingError(": ".join(conflict))


def check_configuration(loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int) -> None:
    """Find what open_listeners would, without a socket that listens. Raises SettingError."""
    in_force = loaded.settings
    wanted, status = read_listeners(loaded, resolve_path, slots)
    for setting, one in wanted:
        with naming(setting):
            one.check()
    for _ in _other_endpoints(loaded, slots):
        pass
    if in_force.access_log not in ("", "-"):
        with opening(loaded.where("access-log"), in_force.access_log):
            check_file(resolve_path(in_force.access_log))
    for setting, one in status:
        with naming(setting):
            one.check()
    check_places(wanted, status)


def _port_and_interface(loaded: LoadedSettings) -> str:
    given = loaded.settings
    interface = f" {loaded.where('interface')} {printable(given.interface)}" if given.interface else ""
    return f"{loaded.where('port')} {given.port}{interface}"


@contextlib.contextmanager
def naming(setting: str) -> Iterator[None]:
    """Turn a ListenError into a SettingError that names the setting."""
    try:
        yield
    except ListenError as error:
        raise SettingError(f"{setting}: {error}") from None


def check_other_types(loaded: LoadedSettings, slots: int) -> None:
    """Find the descriptions of a type that nobody knows, and those that exclude workers. Raises SettingError."""
    for description in loaded.settings.listen:
        with naming(described(loaded, "listen", description)):
            if not (read := parse(description)).ours:
                _check_other_type(read, slots)


def _check_other_type(description: Description, slots: int) -> None:
    """Find whether the type of a description is one of Twisted's or of a plugin's; raises ListenError otherwise."""
    from twisted.internet.interfaces import IStreamServerEndpointStringParser
    from twisted.plugin import getPlugins

    others = {plugin.prefix for plugin in getPlugins(IStreamServerEndpointStringParser)}
    if description.kind not in others:
        raise ListenError(unknown_type(description, () if slots > 1 else others))
    if slots > 1:
        raise ListenError(f"with --workers a listener is one of {', '.join(sorted(TYPES))}")


def _other_endpoint(description: str, slots: int) -> Any:
    """An endpoint of a kind that Twisted or one of its plugins knows; raises ListenError, also for several slots."""
    read = parse(description)
    _check_other_type(read, slots)
    if read.kind == "tls" and "".join(read.positional[:1]).isdecimal():
        # A directory that does not exist would be found when clients are there.
        raise ListenError(f"Twisted's type tls begins with a directory, not with a port{did_you_mean('ssl:…')}")
    from twisted.internet import reactor
    from twisted.internet.endpoints import serverFromString

    try:
        return serverFromString(reactor, description)
    except ImportError as error:
        raise ListenError(f"{error}; is an extra of Twisted missing (pip install 'twisted[tls]')?") from error
    except Exception as error:  # each parser, also those of plugins, raises its own
        why = hide_values(str(error) or type(error).__name__, values_in_description(description))
        # Twisted's `tls` takes a directory, and its name is what most programs have for `ssl`.
        hint = did_you_mean("ssl:…" if read.kind == "tls" else None)
        raise ListenError(f"not a usable endpoint description: {why}{hint}") from error
