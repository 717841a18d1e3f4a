"""The entry point for `twistd`: the command line, and the service made from it. The other entry point is `worker`."""

from __future__ import annotations

import rtservice.first  # noqa: F401  # see there

# isort: split

import atexit
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from twisted.logger import ILogObserver, globalLogPublisher
from twisted.python import usage
from twisted.python.components import Componentized

from rtservice import __version__
from rtservice.config.render import as_toml, shown_settings
from rtservice.config.schema import Setting, Settings, all_settings, changes
from rtservice.config.sources import CONFIG_VARIABLE, LoadedSettings, load_settings, variable
from rtservice.config.usage import Entry, usage_text
from rtservice.config.values import FLAG, SettingError
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.factory import make_factory, resolve_options
from rtservice.hosting.listing import listing
from rtservice.hosting.names import SHIPPED
from rtservice.net.description import ListenError, parse
from rtservice.net.listener import Listener
from rtservice.net.tls import Files, Steps, TLSError, ignore_bad_names
from rtservice.observe.logs import AccessLog, Format, Levels, Log
from rtservice.pool import worker
from rtservice.pool.pool import WorkerPool, WorkerSpec
from rtservice.pool.start_message import describe
from rtservice.process import signals, systemd
from rtservice.process.certificates import renewing
from rtservice.process.counters import DURATIONS, LAGS
from rtservice.process.registry import COLUMNS
from rtservice.process.server import Server, descriptors_for_status, raise_descriptor_limit
from rtservice.process.status_server import StatusServer
from rtservice.process_settings import levels, runtime_settings
from rtservice.references import OptionValue
from rtservice.startup.binding import (
    check_configuration,
    check_other_types,
    check_places,
    open_listeners,
    read_listeners,
)
from rtservice.startup.outputs import Outputs
from rtservice.startup.preflight import (
    check_changes,
    check_descriptors,
    check_directories,
    check_pidfile,
    check_working_directory,
    credentials_of,
    install_reactor,
    open_standard_descriptors,
    path_resolver,
)
from rtservice.startup.start import ExitWithStatus, StartReporter, unexpected
from rtservice.suggestions import did_you_mean, nearest

# Every setting of the command line: those of the schema, and the options of shipped protocols that are settings too.
_SETTINGS = tuple(all_settings(ALIASES))


class _Printed(SystemExit):
    """Exit after printing a text: with status 0, or with an error line if the text cannot be written."""

    def __init__(self, text: str) -> None:
        try:
            # In UTF-8, the encoding of TOML, also if the terminal has another. sys.stdout is None if it is closed.
            with open(1, "wb", closefd=False) as output:
                output.write(text.encode())
        except OSError as error:
            super().__init__(f"rtservice: cannot write to standard output: {error.strerror}")
        else:
            super().__init__(0)


class Options(usage.Options):
    """The command line of `twistd rtservice`, made from the schema, and the settings that result from all sources.

    `options["check"]` is true if the settings are only to be checked.
    """

    synopsis = "[options]"
    optFlags: ClassVar = [
        ["check", None, "Check the settings, certificates and addresses, serve nothing, and exit."],
        ["print-config", None, "Print the settings as a TOML file, with the source of each, and exit."],
    ]
    optParameters: ClassVar = [
        ["config", None, None, "TOML file of settings. Default: the variable RTSERVICE_CONFIG."],
        *(
            [setting.name, setting.short or None, None, setting.help.replace("`", "")]
            for setting in _SETTINGS
            if not setting.repeatable and setting.kind is not FLAG
        ),
    ]

    loaded: LoadedSettings
    start: StartReporter
    directory: str  # in which relative paths in options of the protocol start

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"rtservice {__version__}")
        raise SystemExit(0)

    def getUsage(self, width: int | None = None) -> str:
        """Return the help; `width` is that of the terminal, by default COLUMNS or else 80."""
        if width is None:
            columns = os.environ.get("COLUMNS", "")
            width = int(columns) if re.fullmatch("[0-9]{1,6}", columns) else 80
        names = {"config": " FILE", "check": "", "print-config": "", "version": "", "help": ""}
        entries = [Entry(f"--{name}{metavar}", self.docs[name].strip()) for name, metavar in names.items()]
        return usage_text(_SETTINGS, entries, width)

    def parseOptions(self, options: Iterable[str] | None = None) -> None:
        """Parse as Twisted does, but report a mistake as one line, without the whole help."""
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            hint = self._hint(str(error))
            raise SystemExit(f"rtservice: {error}{hint} (see twistd rtservice --help)") from None
        except SettingError as error:
            raise SystemExit(f"rtservice: {error}") from None

    def _hint(self, problem: str) -> str:
        """Return the end of an error message that suggests an option in place of an unknown one, or an empty text."""
        match = re.fullmatch(r"option -{1,2}([\w-]+) not recognized", problem)
        if match is None:
            return ""
        name = match[1]
        # The options of `twistd` or `twist`.
        command: Any = self.parent
        others = [] if command is None else [_option_name(option) for option in command.longOpt]
        letters = "" if command is None else command.shortOpt.replace(":", "")
        if name in others or (len(name) == 1 and name in letters):
            return f"; put -{'' if len(name) == 1 else '-'}{name} before the word rtservice"
        ours = [_option_name(option) for option in self.longOpt]
        meant = nearest(name, (*others, *ours))
        hint = did_you_mean(meant and f"--{meant}")
        return f"{hint} Put it before the word rtservice" if meant in others else hint

    def parseArgs(self, *args: str) -> None:
        """Reject arguments that are no options."""
        if args and self.get("protocol-option"):  # most often the second half of a value
            raise usage.UsageError(
                "unexpected argument, not shown as it may be a secret; put quotes around an option with blanks"
            )
        if args:
            raise usage.UsageError(f"unexpected argument {args[0]!r}")

    def postOptions(self) -> None:
        """Load the settings. Exit if the command only prints something."""
        twistd: Any = self.parent or {}
        self.start = StartReporter(twistd)
        if self.parent is not None:  # not used by a program that calls makeService itself
            self.start.watch()
        check_working_directory()
        self._environment = dict(os.environ)
        for name, path in (("--config", self["config"]), (CONFIG_VARIABLE, self._environment.get(CONFIG_VARIABLE))):
            if path is not None:
                if not path:
                    raise SettingError(f"{name}: the value is empty")
                # A daemon changes its working directory, and a reload reads the file again.
                self["config"] = os.path.abspath(path)
                break
        # twistd opens the pidfile next. A relative path is checked before the working directory changes.
        check_pidfile(twistd.get("pidfile"), os.path.abspath)
        # Relative paths of `--protocol-option key=@FILE` start here. The files are read again for new workers.
        self._started_in = os.path.abspath(".")
        # The working directory of twistd later on.
        self.directory = os.path.abspath(twistd.get("rundir") or ".")
        self.loaded = self.reloaded()
        if self.settings().protocol == "help":
            raise _Printed(listing())
        if self["print-config"]:
            raise _Printed(as_toml(self.loaded, SHIPPED))

    def settings(self) -> Settings:
        """Return the settings that the process starts with."""
        return self.loaded.settings

    def reloaded(self) -> LoadedSettings:
        """Load the settings with the current content of the file. Raises SettingError."""
        given = {setting.name: self[setting.name] for setting in _SETTINGS if self.get(setting.name) is not None}
        return load_settings(given, self._environment, self["config"], ALIASES)

    def make_factory(self, loaded: LoadedSettings, processes: int = 1) -> Any:
        """Create the factory of these settings, for one of `processes` that serve. Raises SettingError."""
        return make_factory(
            loaded, options=self.protocol_options(loaded), directory=self.directory, processes=processes
        )

    def protocol_options(self, loaded: LoadedSettings) -> tuple[OptionValue, ...]:
        """Return the options of the protocol with the current content of files. Raises SettingError."""
        return resolve_options(loaded, self._environment, self._started_in)


def _option_name(option: str) -> str:
    """Return the name of an option, as users type it, from an entry of usage.Options for getopt."""
    return option.removesuffix("=").replace("_", "-")


def _flag(setting: Setting) -> Callable[[Options], None]:
    def opt(self: Options) -> None:
        self[setting.name] = "true"

    opt.__doc__ = setting.help.replace("`", "")
    return opt


def _repeatable(setting: Setting) -> Callable[[Options, str], None]:
    def opt(self: Options, text: str) -> None:
        self[setting.name] = (*self.get(setting.name, ()), text)

    opt.__doc__ = setting.help.replace("`", "")
    return opt


for _setting in _SETTINGS:
    if _setting.repeatable or _setting.kind is FLAG:
        _opt = _repeatable(_setting) if _setting.repeatable else _flag(_setting)
        for _name in filter(None, (_setting.field, _setting.short)):
            setattr(Options, f"opt_{_name}", _opt)  # Twisted takes one function under two names for synonyms


def makeService(options: Options) -> Server | WorkerPool:
    """Validate everything and bind every socket, then give the service that serves on them.

    Binding happens here, before twistd daemonizes, drops privileges or opens its log: so whatever is wrong is one line
    on the terminal of the command, and its exit status. Raises SystemExit with that line, and leaves no socket
    and no file of one then.
    """
    with contextlib.ExitStack() as bound:
        try:
            service = _make_service(options, bound)
        except SettingError as error:
            raise SystemExit(f"rtservice: {error}") from None
        except SystemExit:
            raise
        except BaseException as error:
            raise SystemExit(f"rtservice: {unexpected(error)}") from error
        bound.pop_all()  # they are the service's
    options.start.service = service
    return service


def _make_service(options: Options, bound: contextlib.ExitStack) -> Server | WorkerPool:
    """Raises SettingError; what is to be closed then is in `bound`."""
    in_force = options.settings()
    twistd: Any = options.parent or {}
    signals.inherit_nothing()
    start = options.start
    leave = ExitWithStatus(start)
    atexit.register(leave)  # first, so that it is run last: a protocol may register something when it is imported
    # It may hold secrets, and what hosted code starts inherits the environment. A reload has a copy.
    os.environ.pop(variable("protocol-option"), None)
    open_standard_descriptors()
    ignore_bad_names()
    log = Log(Levels(levels(in_force)), globalLogPublisher)
    slots = _slots(in_force)
    resolve_path = path_resolver(twistd)
    credentials = credentials_of(twistd, log)
    check_directories(twistd, resolve_path)
    check_changes(twistd, credentials, slots)
    # Before a protocol is imported, which may import the reactor.
    install_reactor(log)
    if slots == 1 or options["check"]:
        factory = options.make_factory(options.loaded, slots)
    else:  # it is the workers' to import, with their rights, but what its options name can be missing here already
        factory = None
        options.protocol_options(options.loaded)
    if options["check"]:
        check_configuration(options.loaded, resolve_path, slots)
        raise _Printed("rtservice: the configuration is valid\n")
    notifier = systemd.from_environment(os.environ)
    nodaemon = twistd.get("nodaemon", True)
    if nodaemon:
        signals.hold()
    descriptors = raise_descriptor_limit()  # the sockets and pipes of many slots are more than the usual 1024
    outputs = Outputs(options.loaded, twistd, resolve_path, log)
    opened, endpoints, status = open_listeners(options.loaded, resolve_path, slots if slots > 1 else 0)
    for listener in (*opened, *status):
        bound.callback(listener.close)
    start.prepare(credentials, log)
    status_server = StatusServer(log, status, descriptors_for_status(descriptors))
    service: Server | WorkerPool
    if slots > 1:
        service = _serve_with_workers(options, opened, log, notifier, start, outputs, status_server)
    else:
        service = _serve_here(options, factory, opened, endpoints, log, notifier, start, outputs, status_server, leave)
    check_descriptors(slots, descriptors)
    if not nodaemon:  # signals are held from its first fork on: the command that waits for it can be interrupted
        start.expect_forks()
    leave.service, leave.outputs = service, outputs
    return service


def _serve_here(
    options: Options,
    factory: Any,
    opened: list[Listener],
    endpoints: list[tuple[str, Any]],
    log: Log,
    notifier: systemd.Notifier,
    start: StartReporter,
    outputs: Outputs,
    status_server: StatusServer,
    leave: ExitWithStatus,
) -> Server:
    reload = _Reload(options, log, status_server)
    server = _Server(
        factory,
        status_server=status_server,
        dropped=outputs.dropped,
        listeners=opened,
        endpoints=endpoints,
        live=runtime_settings(options.settings(), beside=status_server.descriptors),
        log=log,
        notifier=notifier,
        listen_setting=options.loaded.where("listen"),
        check=start.check,
        report=start.report,
        reload=lambda: reload(server),
        leave=leave,
        record=None if outputs.access is None else AccessLog(outputs.access.put),
    )
    server.log_format = outputs.format
    _serve_status(status_server, server, reload)
    return server


def _serve_with_workers(
    options: Options,
    opened: list[Listener],
    log: Log,
    notifier: systemd.Notifier,
    start: StartReporter,
    outputs: Outputs,
    status_server: StatusServer,
) -> WorkerPool:
    reload = _ReloadWorkers(options, log, opened, status_server)
    try:
        plan = _spec(options.loaded, opened, status_server, options)
    except TLSError as error:  # it was well a moment ago
        raise SettingError(str(error)) from None
    supervisor = _Supervisor(
        status_server=status_server,
        dropped=outputs.dropped,
        listeners=opened,
        slots=_slots(options.settings()),
        plan=plan,
        command=[sys.executable, *_interpreter_flags(), "-P", "-m", worker.__name__],
        log=log,
        notifier=notifier,
        check=start.check,
        report=start.report,
        reload=reload,
        access=None if outputs.access is None else outputs.access.put,
    )
    supervisor.log_format = outputs.format
    _serve_status(status_server, supervisor, reload)
    return supervisor


def _interpreter_flags() -> list[str]:
    """What this interpreter was told that others have to be told again, such as -O and -X dev."""
    # Private, and what multiprocessing uses: the flags are spread over half a dozen places.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # not in typeshed
    return flags


def _serve_status(status_server: StatusServer, service: Server | WorkerPool, in_force: _Settings) -> None:
    """Have the site of --status, if there is one, show this service."""
    if status_server:
        from twisted.internet import reactor

        from rtservice.observe.figures import StatusSource
        from rtservice.observe.site import make_site

        source = StatusSource(
            version=__version__,
            standing=lambda: (service.ready, service.standing),
            overview=service.overview,
            rows=service.rows,
            settings=in_force.shown,
            refresh=service.refresh,
            hosts=in_force.status_hosts,
            columns=COLUMNS,
            durations=DURATIONS,
            lags=LAGS,
        )
        status_server.factory = make_site(source, reactor)


def _slots(in_force: Settings) -> int:
    """How many processes serve."""
    return len(os.sched_getaffinity(0)) if in_force.workers is None else in_force.workers


def _spec(
    loaded: LoadedSettings,
    opened: list[Listener],
    status_server: StatusServer,
    options: Options,
    read: Mapping[object, Files] | None = None,
) -> WorkerSpec:
    """What workers are started with from now on. Raises TLSError and SettingError.

    `read` is what was read for the listeners, by their sources; without it, the files are read.
    """
    in_force = loaded.settings
    given = options.protocol_options(loaded)
    described = describe(loaded, opened, options=given, directory=options.directory, read=read or {})
    shown = [*opened, *status_server.listeners] if in_force.watch_certificates else []
    files = {file for listener in shown for file in listener.tls_files()}
    return WorkerSpec(
        start=lambda slot, slots: {**described, "slot": slot, "slots": slots},
        drain_timeout=in_force.drain_timeout,
        hang_timeout=in_force.hang_timeout,
        max_age=in_force.max_worker_age,
        max_memory=in_force.max_worker_memory * 1024 * 1024,
        watched=tuple(sorted(files)),
    )


# What says where to listen.
_OF_LISTENERS = ("listen", "port", "interface", "status")

# What a factory is made of.
_OF_FACTORIES = ("protocol", "protocol-option", *(alias.name for alias in ALIASES))


class _Settings:
    """The settings in force, and what a reload does to them."""

    def __init__(self, options: Options, log: Log) -> None:
        self._options = options
        self._in_force = options.settings()
        self._log = log

    def shown(self) -> dict[str, str]:
        """Each setting in force, without what may be a secret."""
        return shown_settings(self._in_force, SHIPPED)

    def status_hosts(self) -> frozenset[str]:
        """The host names that clients of the status server may name, in lower case."""
        interface = parse(self._in_force.status).interface.lower().removesuffix(".")
        # Every address of this host is no host name, and not the `*` of --status-host, which is any name.
        return frozenset((*self._in_force.status_host, *([] if interface in ("", "*") else [interface])))

    def _wanted(self) -> LoadedSettings:
        """What the file says now; raises SettingError."""
        wanted = self._options.reloaded()
        if any(name in _OF_LISTENERS for name in changes(self._in_force, wanted.settings)[1]):
            # It takes a restart, which must not be what finds the mistake. No name server is asked: the service waits.
            slots = _slots(wanted.settings)
            resolve_path = path_resolver(self._options.parent or {})
            check_places(*read_listeners(wanted, resolve_path, slots), look_up=False)
            check_other_types(wanted, slots)
        return wanted

    def _reloaded(self, wanted: Settings, what: str = "reloaded") -> None:
        """All that can change is what was wanted now."""
        log = self._log
        live, restart = changes(self._in_force, wanted)
        self._log.levels.change(levels(wanted))
        # What takes a restart is left unchanged, so that the next reload says so again.
        changed = {one.field: getattr(wanted, one.field) for one in all_settings() if one.name in live}
        self._in_force = dataclasses.replace(self._in_force, **changed)
        log.info("{what}; changed: {names}", what=what, names=", ".join(live) or "no setting")
        if restart:
            log.warn("a restart is needed for what changed of {names}", names=", ".join(restart))


class _Reload(_Settings):
    """What SIGHUP does: everything that changed and can change while the service runs, or nothing at all."""

    def __init__(self, options: Options, log: Log, status_server: StatusServer) -> None:
        super().__init__(options, log)
        self._status_server = status_server

    def __call__(self, server: Server) -> Steps[None]:
        """The steps of a reload; what they read is in force at once, when all of it was found to be right."""
        try:
            loaded = self._wanted()
            wanted = loaded.settings
            if any(name in _OF_FACTORIES for name in changes(self._in_force, wanted)[1]):
                self._options.make_factory(loaded)  # it takes a restart, which must not be what finds the mistake
            adopt_certificates = yield from server.renewing_certificates()
        except (SettingError, ListenError) as problem:
            self._log.error("nothing is reloaded: {problem}", problem=problem)
            return
        adopted = adopt_certificates()
        server.apply(runtime_settings(wanted, beside=self._status_server.descriptors))
        yield from adopted
        self._reloaded(wanted)


class _ReloadWorkers(_Settings):
    """The same with workers, which are replaced: the plan for those to come."""

    def __init__(self, options: Options, log: Log, opened: list[Listener], status_server: StatusServer) -> None:
        super().__init__(options, log)
        self._opened = opened
        self._status_server = status_server

    def __call__(self) -> Steps[WorkerSpec | None]:
        """The steps of a reload, which give the plan."""
        try:
            wanted = self._wanted().settings
            # Workers read what their listeners show from the plan; what is said of it is said here.
            read: dict[object, Files] = {}
            served = [*((listener, None) for listener in self._opened), *self._status_server.served()]
            adopt = yield from renewing(served, read)
            live, _ = changes(self._in_force, wanted)
            changed = {one.field: getattr(wanted, one.field) for one in all_settings() if one.name in live}
            loaded = LoadedSettings(dataclasses.replace(self._in_force, **changed), self._options.loaded.sources)
            plan = _spec(loaded, self._opened, self._status_server, self._options, read)
        except (SettingError, ListenError, TLSError) as problem:
            self._log.error("nothing is reloaded: {problem}", problem=problem)
            return None
        yield from adopt()
        self._reloaded(wanted, "workers are replaced")
        return plan


class _Logged:
    """A service that has twistd log in `log_format`, if there is one."""

    log_format: Format | None = None

    def setServiceParent(self, parent: Any) -> None:
        # Twistd asks its application for an observer, and makes its own if that has none.
        if self.log_format is not None and isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self.log_format())
        super().setServiceParent(parent)  # type: ignore[misc]  # it stands before a Service


class _Server(_Logged, Server):
    """A Server for twistd."""


class _Supervisor(_Logged, WorkerPool):
    """A Supervisor for twistd."""
