"""Reload on SIGHUP: read settings and certificates, check all of them, and apply them to the server or the workers."""

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
from rtservice.net.tls import Files, TLSError
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
from rtservice.steps import Steps

# Settings that determine the listeners.
_OF_LISTENERS = ("listen", "port", "interface", "status")

# Settings that determine the factory.
_OF_FACTORIES = ("protocol", "protocol-option", *(alias.name for alias in ALIASES))


class CurrentSettings:
    """The current settings: those of the start, with what each reload has changed."""

    def __init__(self, loaded: LoadedSettings, source: SettingsSource, resolve_path: Callable[[str], str]) -> None:
        self.current = loaded.settings
        self.source = source
        self._sources = loaded.sources
        self._resolve_path = resolve_path

    def shown(self) -> dict[str, str]:
        """Return each setting as text, by name, without values that may be secret."""
        return shown_settings(self.current, SHIPPED)

    def status_hosts(self) -> frozenset[str]:
        """Return the host names, in lower case, that the status server accepts in the header Host."""
        interface = parse(self.current.status).interface.lower().removesuffix(".")
        # Here `*` means all addresses of this host. In --status-host it means any name.
        return frozenset((*self.current.status_host, *([] if interface in ("", "*") else [interface])))

    def read(self) -> LoadedSettings:
        """Return the new settings, checked as for a start. Raises SettingError."""
        loaded = self.source.read()
        need_restart = changes(self.current, loaded.settings)[1]
        # What needs a restart is checked now, so that an error does not appear only at the restart.
        if "hub-file" in need_restart:
            self.source.hub_url(loaded)
        if any(name in _OF_LISTENERS for name in need_restart):
            # Host names are not resolved: the service would wait for the resolver.
            slots = process_count(loaded.settings)
            check_places(*read_listeners(loaded, self._resolve_path, slots), look_up=False)
            check_other_types(loaded, slots)
        return loaded

    def merged(self, new: Settings) -> LoadedSettings:
        """Return the current settings, with those of `new` that a reload changes."""
        # The others stay unchanged, so that the next reload names them again.
        live, _ = changes(self.current, new)
        changed = {setting.field: getattr(new, setting.field) for setting in all_settings() if setting.name in live}
        return LoadedSettings(dataclasses.replace(self.current, **changed), self._sources)

    def use(self, new: Settings, log: Log) -> None:
        """Make the new settings current, as far as a reload changes them, and log the names of all changed ones."""
        live, restart = changes(self.current, new)
        log.levels.change(levels(new))
        self.current = self.merged(new).settings
        SETTINGS_RELOADED.log(log, settings=", ".join(live) or "none")
        if restart:
            SETTINGS_NEED_RESTART.log(log, settings=", ".join(restart))


class ReloadServer:
    """Reloads the server of this process: applies all changed settings and certificates, or nothing."""

    def __init__(self, settings: CurrentSettings, server: Server, status_server: StatusServer, log: Log) -> None:
        self._settings = settings
        self._server = server
        self._status_server = status_server
        self._log = log

    def steps(self) -> Steps[bool]:
        """Read settings and certificates. Apply them together if all are valid.

        Returns whether the certificates were read: invalid settings must not keep later checks from loading them.
        """
        RELOAD_STARTED.log(self._log)
        settings = self._settings
        certificates_read = False
        try:
            loaded = settings.read()
            new = loaded.settings
            if any(name in _OF_FACTORIES for name in changes(settings.current, new)[1]):
                # These need a restart. Checked now, so that an error does not appear only at the restart.
                settings.source.make_factory(loaded)
            certificates_read = True
            use_certificates = yield from renewing(self._served())
        except (SettingError, ListenError) as problem:
            RELOAD_FAILED.log(self._log, problem=str(problem))
            return certificates_read
        freeing = use_certificates()
        self._server.apply(runtime_settings(new, reserved=self._status_server.descriptors))
        yield from logging_certificates(self._log, self._server.listeners)
        yield from freeing
        settings.use(new, self._log)
        RELOAD_DONE.log(self._log, status=self._server.status)
        return True

    def renewal(self) -> Steps[None]:
        """Renew the certificates, and nothing else."""
        try:
            use_certificates = yield from renewing(self._served())
        except ListenError as problem:
            CERTIFICATES_REJECTED.log(self._log, problem=str(problem))
            return
        freeing = use_certificates()
        yield from logging_certificates(self._log, self._server.listeners)
        yield from freeing

    def _served(self) -> list[tuple[Listener, Port]]:
        return [*self._server.served(), *self._status_server.served()]


class ReloadWorkers:
    """Replaces the workers by workers with the new settings, certificates and code."""

    def __init__(self, settings: CurrentSettings, pool: WorkerPool, status_server: StatusServer, log: Log) -> None:
        self._settings = settings
        self._pool = pool
        self._status_server = status_server
        self._log = log

    def steps(self) -> Steps[bool]:
        """Read settings and certificates. If all are valid, let the pool replace its workers.

        Returns True: a check of the certificates is a whole reload here, and would repeat one that fails every second.
        """
        RELOAD_STARTED.log(self._log)
        listeners = self._pool.listeners
        try:
            new = self._settings.read().settings
            # The new workers receive these files in their `start` message.
            read: dict[object, Files] = {}
            served = [*((listener, None) for listener in listeners), *self._status_server.served()]
            use_certificates = yield from renewing(served, read)
            spec = worker_spec(self._settings.merged(new), listeners, self._settings.source, read)
        except (SettingError, ListenError, TLSError) as problem:
            RELOAD_FAILED.log(self._log, problem=str(problem))
            return True
        yield from use_certificates()
        self._settings.use(new, self._log)
        yield from logging_certificates(self._log, listeners)
        self._pool.apply(spec)
        return True

    def renewal(self) -> None:
        """Return None: workers receive certificates when they start, so a full reload is needed."""


def worker_spec(
    loaded: LoadedSettings,
    listeners: list[Listener],
    source: SettingsSource,
    read: Mapping[object, Files] | None = None,
) -> WorkerSpec:
    """Return the spec of workers with these settings. Raises TLSError and SettingError.

    `read` has the files of the listeners, by their sources. Without it, the files are read.
    """
    settings = loaded.settings
    described = describe(
        loaded,
        listeners,
        options=source.protocol_options(loaded),
        hub=source.hub_url(loaded),
        directory=source.directory,
        read=read or {},
    )
    return WorkerSpec(
        start=lambda slot, slots: {**described, "slot": slot, "slots": slots},
        drain_timeout=settings.drain_timeout,
        hang_timeout=settings.hang_timeout,
        max_age=settings.max_worker_age,
        max_memory=settings.max_worker_memory * 1024 * 1024,
        hub_required=settings.hub_required,
        watch_certificates=settings.watch_certificates,
    )
