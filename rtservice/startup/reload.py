"""SIGHUP: read settings and certificates again, check all of them, and apply them to the server or the workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from rtservice.config.render import shown_settings
from rtservice.config.schema import Settings, all_settings, changes
from rtservice.config.sources import LoadedSettings
from rtservice.config.values import SettingError
from rtservice.events import (
    CERTIFICATES_REJECTED,
    RELOAD_DONE,
    RELOAD_FAILED,
    RELOAD_STARTED,
    SETTINGS_NEED_RESTART,
    SETTINGS_RELOADED,
)
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.names import SHIPPED
from rtservice.net.description import ListenError, parse
from rtservice.net.listener import Listener
from rtservice.net.port import Port
from rtservice.net.tls import Files, Steps, TLSError
from rtservice.observe.logs import Log
from rtservice.pool.pool import WorkerPool
from rtservice.pool.start_message import describe
from rtservice.pool.worker_process import WorkerSpec
from rtservice.process.certificates import logging_certificates, renewing
from rtservice.process.server import Server
from rtservice.process.status_server import StatusServer
from rtservice.process_settings import levels, process_count, runtime_settings
from rtservice.startup.binding import check_other_types, check_places, read_listeners
from rtservice.startup.settings_source import SettingsSource

# Settings that say where to listen.
_OF_LISTENERS = ("listen", "port", "interface", "status")

# Settings that a factory is made of.
_OF_FACTORIES = ("protocol", "protocol-option", *(alias.name for alias in ALIASES))


class CurrentSettings:
    """The settings that are in use: those of the start, and of each reload what can change while the service runs."""

    def __init__(self, loaded: LoadedSettings, source: SettingsSource, resolve_path: Callable[[str], str]) -> None:
        self.current = loaded.settings
        self.source = source
        self._sources = loaded.sources
        self._resolve_path = resolve_path

    def shown(self) -> dict[str, str]:
        """Return each setting as text, by name, without values that may be secret."""
        return shown_settings(self.current, SHIPPED)

    def status_hosts(self) -> frozenset[str]:
        """Return the host names, in lower case, that clients of the status server may name."""
        interface = parse(self.current.status).interface.lower().removesuffix(".")
        # Every address of this host is no host name, and not the `*` of --status-host, which is any name.
        return frozenset((*self.current.status_host, *([] if interface in ("", "*") else [interface])))

    def read(self) -> LoadedSettings:
        """Return the settings that the file contains now, checked as for a start. Raises SettingError."""
        wanted = self.source.read()
        if any(name in _OF_LISTENERS for name in changes(self.current, wanted.settings)[1]):
            # It takes a restart, which must not be what finds the mistake. No name server is asked: the service waits.
            slots = process_count(wanted.settings)
            check_places(*read_listeners(wanted, self._resolve_path, slots), look_up=False)
            check_other_types(wanted, slots)
        return wanted

    def merged(self, wanted: Settings) -> LoadedSettings:
        """Return the current settings, with those of `wanted` that can change while the service runs."""
        # The others stay unchanged, so that the next reload names them again.
        live, _ = changes(self.current, wanted)
        changed = {setting.field: getattr(wanted, setting.field) for setting in all_settings() if setting.name in live}
        return LoadedSettings(dataclasses.replace(self.current, **changed), self._sources)

    def adopt(self, wanted: Settings, log: Log) -> None:
        """Use what can change from now on, and log the names of all that has changed."""
        live, restart = changes(self.current, wanted)
        log.levels.change(levels(wanted))
        self.current = self.merged(wanted).settings
        SETTINGS_RELOADED.log(log, settings=", ".join(live) or "none")
        if restart:
            SETTINGS_NEED_RESTART.log(log, settings=", ".join(restart))


class ReloadServer:
    """Reloads a server in this process: everything that changed and can change while it serves, or nothing at all."""

    def __init__(self, settings: CurrentSettings, server: Server, status_server: StatusServer, log: Log) -> None:
        self._settings = settings
        self._server = server
        self._status_server = status_server
        self._log = log

    def steps(self) -> Steps[None]:
        """Read settings and certificates, and apply them at once when all are found to be right."""
        RELOAD_STARTED.log(self._log)
        settings = self._settings
        try:
            loaded = settings.read()
            wanted = loaded.settings
            if any(name in _OF_FACTORIES for name in changes(settings.current, wanted)[1]):
                settings.source.make_factory(loaded)  # it takes a restart, which must not be what finds the mistake
            adopt = yield from renewing(self._served())
        except (SettingError, ListenError) as problem:
            RELOAD_FAILED.log(self._log, problem=str(problem))
            return
        freeing = adopt()
        self._server.apply(runtime_settings(wanted, beside=self._status_server.descriptors))
        yield from logging_certificates(self._log, self._server.listeners)
        yield from freeing
        settings.adopt(wanted, self._log)
        RELOAD_DONE.log(self._log, status=self._server.status)

    def renewal(self) -> Steps[None]:
        """Renew the certificates alone."""
        try:
            adopt = yield from renewing(self._served())
        except ListenError as problem:
            CERTIFICATES_REJECTED.log(self._log, problem=str(problem))
            return
        freeing = adopt()
        yield from logging_certificates(self._log, self._server.listeners)
        yield from freeing

    def _served(self) -> list[tuple[Listener, Port]]:
        return [*self._server.served(), *self._status_server.served()]


class ReloadWorkers:
    """Replaces the workers by others, with the settings, certificates and code of now."""

    def __init__(self, settings: CurrentSettings, pool: WorkerPool, status_server: StatusServer, log: Log) -> None:
        self._settings = settings
        self._pool = pool
        self._status_server = status_server
        self._log = log

    def steps(self) -> Steps[None]:
        """Read settings and certificates, and have the pool replace its workers when all are found to be right."""
        RELOAD_STARTED.log(self._log)
        listeners = self._pool.listeners
        try:
            wanted = self._settings.read().settings
            # The new workers get what was read here, in their `start` message.
            read: dict[object, Files] = {}
            served = [*((listener, None) for listener in listeners), *self._status_server.served()]
            adopt = yield from renewing(served, read)
            spec = worker_spec(self._settings.merged(wanted), listeners, self._settings.source, read)
        except (SettingError, ListenError, TLSError) as problem:
            RELOAD_FAILED.log(self._log, problem=str(problem))
            return
        yield from adopt()
        self._settings.adopt(wanted, self._log)
        yield from logging_certificates(self._log, listeners)
        self._pool.apply(spec)

    def renewal(self) -> None:
        """Workers have to be replaced: they get their certificates when they start."""


def worker_spec(
    loaded: LoadedSettings,
    listeners: list[Listener],
    source: SettingsSource,
    read: Mapping[object, Files] | None = None,
) -> WorkerSpec:
    """Return what to start workers with. Raises TLSError and SettingError.

    `read` is what was read for the listeners, by their sources; without it, the files are read.
    """
    settings = loaded.settings
    described = describe(
        loaded, listeners, options=source.protocol_options(loaded), directory=source.directory, read=read or {}
    )
    return WorkerSpec(
        start=lambda slot, slots: {**described, "slot": slot, "slots": slots},
        drain_timeout=settings.drain_timeout,
        hang_timeout=settings.hang_timeout,
        max_age=settings.max_worker_age,
        max_memory=settings.max_worker_memory * 1024 * 1024,
        watch_certificates=settings.watch_certificates,
    )
