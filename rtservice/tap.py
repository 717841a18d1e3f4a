"""The entry point for `twistd`: the command line, and the service made from it. The other entry point is `worker`."""

from __future__ import annotations

import rtservice.first  # noqa: F401  # see there

# isort: split

import atexit
import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar

from twisted.logger import ILogObserver, globalLogPublisher
from twisted.python import usage
from twisted.python.components import Componentized
from twisted.python.failure import Failure

from rtservice import __version__, hosting, worker
from rtservice.config.render import as_toml, shown
from rtservice.config.schema import Setting, Settings, all_settings, changes
from rtservice.config.sources import CONFIG_VARIABLE, LoadedSettings, load_settings, variable
from rtservice.config.values import FLAG, SettingError, as_text, printable
from rtservice.hidden import hide_in_description, hide_values, values_in_description
from rtservice.host import signals, systemd
from rtservice.host.certificates import renewing
from rtservice.host.connections import COLUMNS
from rtservice.host.counters import DURATIONS, LAGS
from rtservice.host.credentials import Credentials, CredentialsError, resolve
from rtservice.host.dry_run import problem_of
from rtservice.host.server import Server, descriptors_for_status, raise_descriptor_limit, traceback_level
from rtservice.host.status_server import StatusServer
from rtservice.host.supervisor import Supervisor, WorkerSpec
from rtservice.net import listeners
from rtservice.net.description import TYPES, Description, ListenError, parse, unknown_type
from rtservice.net.listener import Listener
from rtservice.net.places import first_conflict
from rtservice.net.tls import Files, Steps, TLSError, ignore_bad_names
from rtservice.observe import logs
from rtservice.observe.lines import LineWriter, Output, say_aside
from rtservice.observe.logfile import LogFile, check_file
from rtservice.observe.logs import AccessLog, Format, Levels, Log
from rtservice.references import OptionValue
from rtservice.suggestions import did_you_mean, nearest

# Of a listener of --status, whose clients wait for a fraction of a second when there are many.
_STATUS_BACKLOG = 1024


def _help(setting: Setting) -> str:
    default = as_text(setting.default)
    return setting.help.replace("`", "") + (f" [default: {default}]" if default else "")


class _Printed(SystemExit):
    """The end of a command that was to print this; with a line in the place of its status when it could not."""

    def __init__(self, text: str) -> None:
        try:
            # In the encoding of TOML, whatever that of the terminal is. Python's own is None when it is closed.
            with open(1, "wb", closefd=False) as output:
                output.write(text.encode())
        except OSError as error:
            super().__init__(f"rtservice: cannot write to standard output: {error.strerror}")
        else:
            super().__init__(0)


class Options(usage.Options):
    """The command line, made from the schema in `settings`, and what it gives with the environment and the file.

    `options["check"]` is true when nothing is to be served.
    """

    synopsis = "[options]"
    longdesc = (
        "Serves a Twisted protocol over TCP and UNIX sockets; by default, greets each client and echoes it. What is "
        "not given here is taken from the environment (RTSERVICE_MAX_CONNECTIONS=100), then from the file of --config "
        "(max-connections = 100)."
    )

    optFlags: ClassVar = [
        ["check", None, "Validate everything, certificates and addresses included, serve nothing, and exit."],
        ["print-config", None, "Print the settings as a TOML file, each with where it came from, and exit."],
    ]
    optParameters: ClassVar = [
        ["config", None, None, "A TOML file of settings, named as they are here [default: RTSERVICE_CONFIG]"],
        *(
            [setting.name, setting.short or None, None, _help(setting)]
            for setting in all_settings()
            if not setting.repeatable and setting.kind is not FLAG
        ),
    ]

    loaded: LoadedSettings
    start: StartReporter
    directory: str  # in which relative paths of a protocol's options begin

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"rtservice {__version__}")
        raise SystemExit(0)

    def parseOptions(self, options: Iterable[str] | None = None) -> None:
        """As in Twisted, but a mistake is one line and not the whole help with a line below it."""
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            hint = self._hint(str(error))
            raise SystemExit(f"rtservice: {error}{hint} (see twistd rtservice --help)") from None
        except SettingError as error:
            raise SystemExit(f"rtservice: {error}") from None

    def _hint(self, problem: str) -> str:
        """What may have been meant by an option that does not exist."""
        match = re.fullmatch(r"option -{1,2}([\w-]+) not recognized", problem)
        if match is None:
            return ""
        name = match[1]
        # `twistd`, or `twist`.
        command: Any = self.parent
        others = [] if command is None else [_option_name(option) for option in command.longOpt]
        letters = "" if command is None else command.shortOpt.replace(":", "")
        if name in others or (len(name) == 1 and name in letters):
            return f"; put -{'' if len(name) == 1 else '-'}{name} before the word rtservice"
        ours = [_option_name(option) for option in self.longOpt]
        meant = nearest(name, (*others, *ours))
        hint = did_you_mean(meant and f"--{meant}")
        return f"{hint} It stands before the word rtservice" if meant in others else hint

    def parseArgs(self, *args: str) -> None:
        if args and self.get("protocol-option"):  # most often the second half of a value
            raise usage.UsageError("unexpected argument, which is not shown; quote options of a protocol with blanks")
        if args:
            raise usage.UsageError(f"unexpected argument {args[0]!r}")

    def postOptions(self) -> None:
        twistd: Any = self.parent or {}
        self.start = StartReporter(twistd)
        if self.parent is not None:  # the command is this process's, and not that of a program that makes a service
            self.start.watch()
        _check_working_directory()
        self._environment = dict(os.environ)
        for name, path in (("--config", self["config"]), (CONFIG_VARIABLE, self._environment.get(CONFIG_VARIABLE))):
            if path is not None:
                if not path:
                    raise SettingError(f"{name}: the value is empty")
                # A daemon changes its directory, and reads the file again on SIGHUP.
                self["config"] = os.path.abspath(path)
                break
        # Before twistd opens it, which it does next, and before it is relative to another directory.
        _check_pidfile(twistd.get("pidfile"), os.path.abspath)
        # Where files are that options of a protocol name; a daemon reads them again for new workers.
        self._started_in = os.path.abspath(".")
        # Where twistd is going to be.
        self.directory = os.path.abspath(twistd.get("rundir") or ".")
        self.loaded = self.reloaded()
        if self.settings().protocol == "help":
            raise _Printed(hosting.listing())
        if self["print-config"]:
            raise _Printed(as_toml(self.loaded))

    def settings(self) -> Settings:
        """The settings that the process starts with."""
        return self.loaded.settings

    def reloaded(self) -> LoadedSettings:
        """The settings with what the file says now; raises SettingError."""
        given = {one.name: self[one.name] for one in all_settings() if self.get(one.name) is not None}
        return load_settings(given, self._environment, self["config"])

    def make_factory(self, loaded: LoadedSettings, processes: int = 1) -> Any:
        """The factory of these settings, for one of so many processes; raises SettingError."""
        return hosting.make_factory(
            loaded, options=self.protocol_options(loaded), directory=self.directory, processes=processes
        )

    def protocol_options(self, loaded: LoadedSettings) -> tuple[OptionValue, ...]:
        """The options of the protocol with what their files hold now; raises SettingError."""
        return hosting.resolve_options(loaded, self._environment, self._started_in)


def _option_name(option: str) -> str:
    """An option as it is typed, of what usage.Options has for getopt."""
    return option.removesuffix("=").replace("_", "-")


def _flag(setting: Setting) -> Callable[[Options], None]:
    def opt(self: Options) -> None:
        self[setting.name] = "true"

    opt.__doc__ = _help(setting)
    return opt


def _repeatable(setting: Setting) -> Callable[[Options, str], None]:
    def opt(self: Options, text: str) -> None:
        self[setting.name] = (*self.get(setting.name, ()), text)

    opt.__doc__ = _help(setting)
    return opt


for _setting in all_settings():
    if _setting.repeatable or _setting.kind is FLAG:
        _opt = _repeatable(_setting) if _setting.repeatable else _flag(_setting)
        for _name in filter(None, (_setting.field, _setting.short)):
            setattr(Options, f"opt_{_name}", _opt)  # Twisted takes one function under two names for synonyms


def makeService(options: Options) -> Server | Supervisor:
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
            raise SystemExit(f"rtservice: {_unexpected(error)}") from error
        bound.pop_all()  # they are the service's
    options.start.service = service
    return service


def _make_service(options: Options, bound: contextlib.ExitStack) -> Server | Supervisor:
    """Raises SettingError; what is to be closed then is in `bound`."""
    in_force = options.settings()
    twistd: Any = options.parent or {}
    signals.inherit_nothing()
    start = options.start
    leave = ExitWithStatus(start)
    atexit.register(leave)  # first, so that it is run last: a protocol may register something when it is imported
    # It may hold secrets, and what hosted code starts inherits the environment. A reload has a copy.
    os.environ.pop(variable("protocol-option"), None)
    _open_standard_descriptors()
    ignore_bad_names()
    log = Log(Levels(worker.levels(in_force)), globalLogPublisher)
    slots = _slots(in_force)
    resolve_path = _path_resolver(twistd)
    credentials = _credentials(twistd, log)
    _check_directories(twistd, resolve_path)
    _check_changes(twistd, credentials, slots)
    # Before a protocol is imported, which may import the reactor.
    _install_reactor(log)
    if slots == 1 or options["check"]:
        factory = options.make_factory(options.loaded, slots)
    else:  # it is the workers' to import, with their rights, but what its options name can be missing here already
        factory = None
        options.protocol_options(options.loaded)
    if options["check"]:
        _check(options.loaded, resolve_path, slots)
        raise _Printed("rtservice: the configuration is valid\n")
    notifier = systemd.from_environment(os.environ)
    nodaemon = twistd.get("nodaemon", True)
    if nodaemon:
        signals.hold()
    descriptors = raise_descriptor_limit()  # the sockets and pipes of many slots are more than the usual 1024
    outputs = _Outputs(options.loaded, twistd, resolve_path, log)
    opened, endpoints, status = _open(options.loaded, resolve_path, slots if slots > 1 else 0)
    for listener in (*opened, *status):
        bound.callback(listener.close)
    start.prepare(credentials, log)
    status_server = StatusServer(log, status, descriptors_for_status(descriptors))
    service: Server | Supervisor
    if slots > 1:
        service = _serve_with_workers(options, opened, log, notifier, start, outputs, status_server)
    else:
        service = _serve_here(options, factory, opened, endpoints, log, notifier, start, outputs, status_server, leave)
    _check_descriptors(slots, descriptors)
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
    outputs: _Outputs,
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
        live=worker.runtime_settings(options.settings(), beside=status_server.descriptors),
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
    outputs: _Outputs,
    status_server: StatusServer,
) -> Supervisor:
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


def _serve_status(status_server: StatusServer, service: Server | Supervisor, in_force: _Settings) -> None:
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
    described = worker.describe(loaded, opened, options=given, directory=options.directory, read=read or {})
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


def _open_standard_descriptors() -> None:
    """Open those of 0 to 2 that are closed; twistd replaces them all when it daemonizes, and must not find ours."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _open(
    loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int
) -> tuple[list[Listener], list[tuple[str, Any]], list[Listener]]:
    """Every listener, bound, the endpoints that can only be bound later, and the listeners of --status.

    Raises SettingError.
    """
    wanted, status = _read_listeners(loaded, resolve_path, slots)
    endpoints = [
        (hide_in_description(description), endpoint) for description, endpoint in _other_endpoints(loaded, slots)
    ]
    _check_places(wanted, status)
    opened: list[Listener] = []
    try:
        for setting, one in wanted:
            with _naming(setting):
                opened += one.open()
        for setting, one in status:
            with _naming(setting):
                return opened, endpoints, one.open()
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened, endpoints, []


# Settings, as errors begin, with what they want to listen on.
_Listeners = list[tuple[str, listeners.Wanted]]


def _read_listeners(
    loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int
) -> tuple[_Listeners, _Listeners]:
    """What is to be listened on by this package, and for --status, with nothing opened. Raises SettingError."""
    in_force = loaded.settings
    wanted: _Listeners = []
    for description in in_force.listen:
        with _naming(setting := _described(loaded, "listen", description)):
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
        with _naming(setting := _described(loaded, "status", in_force.status)):
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


def _described(loaded: LoadedSettings, name: str, description: str) -> str:
    return f"{loaded.where(name)} {printable(hide_in_description(description))}"


def _other_endpoints(loaded: LoadedSettings, slots: int) -> Iterator[tuple[str, Any]]:
    """The descriptions that are Twisted's or a plugin's to understand, with their endpoints. Raises SettingError."""
    for description in loaded.settings.listen:
        with _naming(_described(loaded, "listen", description)):
            if not parse(description).ours:
                yield description, _other_endpoint(description, slots)


def _check_places(wanted: _Listeners, status: _Listeners, *, look_up: bool = True) -> None:
    """Find two listeners that exclude each other, before any is bound. Raises SettingError."""
    places = []
    for setting, one in (*wanted, *status):
        with _naming(setting):
            places.append((setting, one.places(look_up=look_up)))
    if conflict := first_conflict(places):
        raise SettingError(": ".join(conflict))


def _check(loaded: LoadedSettings, resolve_path: Callable[[str], str], slots: int) -> None:
    """Find what _open would, without a socket that listens. Raises SettingError."""
    in_force = loaded.settings
    wanted, status = _read_listeners(loaded, resolve_path, slots)
    for setting, one in wanted:
        with _naming(setting):
            one.check()
    for _ in _other_endpoints(loaded, slots):
        pass
    if in_force.access_log not in ("", "-"):
        with _opening(loaded.where("access-log"), in_force.access_log):
            check_file(resolve_path(in_force.access_log))
    for setting, one in status:
        with _naming(setting):
            one.check()
    _check_places(wanted, status)


def _port_and_interface(loaded: LoadedSettings) -> str:
    given = loaded.settings
    interface = f" {loaded.where('interface')} {printable(given.interface)}" if given.interface else ""
    return f"{loaded.where('port')} {given.port}{interface}"


# What says where to listen.
_OF_LISTENERS = ("listen", "port", "interface", "status")

# What a factory is made of.
_OF_FACTORIES = ("protocol", "protocol-option", *hosting.ECHO_SETTINGS)


class _Settings:
    """The settings in force, and what a reload does to them."""

    def __init__(self, options: Options, log: Log) -> None:
        self._options = options
        self._in_force = options.settings()
        self._log = log

    def shown(self) -> dict[str, str]:
        """Each setting in force, without what may be a secret."""
        return {one.name: shown(one, self._in_force) for one in all_settings()}

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
            resolve_path = _path_resolver(self._options.parent or {})
            _check_places(*_read_listeners(wanted, resolve_path, slots), look_up=False)
            _check_other_types(wanted, slots)
        return wanted

    def _reloaded(self, wanted: Settings, what: str = "reloaded") -> None:
        """All that can change is what was wanted now."""
        log = self._log
        live, restart = changes(self._in_force, wanted)
        self._log.levels.change(worker.levels(wanted))
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
        server.apply(worker.runtime_settings(wanted, beside=self._status_server.descriptors))
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


class _Outputs:
    """The files that this process writes lines to, opened before privileges are dropped. Raises SettingError.

    `format` is what twistd is to log with, unless it was told that: its own observers write each record by itself, wait
    for a pipe that nobody reads, and are at a loss when a disk is full. The lines are the same, in the same file. What
    else `--logger` or `--syslog` asks for is left alone.
    """

    def __init__(self, loaded: LoadedSettings, twistd: Any, resolve_path: Callable[[str], str], log: Log) -> None:
        self.format: Format | None = None
        self.access: LineWriter | None = None
        self._lines: list[LineWriter] = []
        # Who reads standard output reads standard error, most likely.
        self._aside: Callable[[str], None] | None = say_aside
        chosen = twistd.get("logger")
        main: LineWriter | None = None
        if isinstance(chosen, Format) or ("logger" in twistd and chosen is None and not twistd["syslog"]):
            log_format = chosen or logs.classic
            self.format = None if chosen else log_format
            log_format.levels = log.levels
            file = twistd["logfile"] or ("-" if twistd["nodaemon"] else "twistd.log")
            if file == "-":
                self._aside = None
            with _opening("--logfile", file):
                # The mode that twistd gives it.
                output = self._output(file, twistd, rotated=loaded.settings.log_files, mode=0o666)
                main = log_format.lines = self._start(output)
            if isinstance(output, LogFile) and output.beyond:
                log.warn(
                    "{file} and older files are left alone: --log-files is {count}",
                    file=output.beyond,
                    count=loaded.settings.log_files,
                )
        file = loaded.settings.access_log
        if file:
            with _opening(loaded.where("access-log"), file):
                path = file if file == "-" else resolve_path(file)
                # One batch after the other, and one rotation for both.
                shared = main is not None and _same_file(1 if file == "-" else path, main.fileno())
                self.access = main if shared else self._start(self._output(path, twistd))
        before = signals.handler(signal.SIGUSR1)
        self._before = before if callable(before) else None
        signal.signal(signal.SIGUSR1, self._signalled)

    def dropped(self) -> int:
        """How many lines nobody took."""
        return sum(lines.dropped for lines in self._lines)

    def _output(self, file: str, twistd: Any, **how: int) -> Output:
        if file != "-":
            return LogFile(os.path.abspath(file), **how)
        if "nodaemon" in twistd and not twistd["nodaemon"]:
            raise SettingError("a daemon has no standard output")
        return logs.standard_output()

    def _start(self, output: Output) -> LineWriter:
        from twisted.internet import reactor

        lines = LineWriter(output, aside=self._aside)
        lines.start(reactor)
        self._lines.append(lines)
        return lines

    def _signalled(self, number: int, frame: Any) -> None:
        from twisted.internet import reactor

        for lines in self._lines:  # in a call for each, so that none depends on another
            reactor.callFromThread(lines.reopen)  # type: ignore[attr-defined]  # the module stands for the object
        if self._before is not None:
            self._before(number, frame)

    def finish(self) -> None:
        """Write what is left."""
        for lines in self._lines:
            lines.finish()


def _same_file(one: str | int, other: int) -> bool:
    """Whether a path or a descriptor is the file of a descriptor."""
    try:
        return os.path.samestat(os.stat(one), os.fstat(other))
    except OSError:
        return False


@contextlib.contextmanager
def _opening(setting: str, file: str) -> Iterator[None]:
    """Turn an OSError into a SettingError that names the setting and the file."""
    try:
        yield
    except OSError as error:
        raise SettingError(f"{setting} {file}: cannot be written: {error.strerror}") from None
    except SettingError as error:
        raise SettingError(f"{setting} {file}: {error}") from None


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


class _Supervisor(_Logged, Supervisor):
    """A Supervisor for twistd."""


class StartReporter:
    """A start, from the options to the service that serves. What fails meanwhile ends the process with one line.

    What Twisted does between `makeService` and the reactor may raise, too, and would be a traceback: `watch` has it
    reported like all else, and the sockets of `service` closed.
    """

    service: Server | Supervisor | None = None

    def __init__(self, twistd: Any) -> None:
        self._twistd = twistd
        self._credentials = Credentials()
        self._log: Log | None = None
        self._pipe: int | None = None
        self._terminal: int | None = None
        self._hook: Callable[..., object] | None = None
        self._forks = 0  # that are still to come
        self.over = False  # it went well, or has been reported

    def watch(self) -> None:
        """Report what nobody catches, until the start is over."""
        self._hook, sys.excepthook = sys.excepthook, self._uncaught

    def prepare(self, credentials: Credentials, log: Log) -> None:
        """Keep the terminal, which is not 2 any more once twistd has daemonized, and have `check` change the user."""
        self._log = log
        self._terminal = os.dup(2)
        self._credentials = credentials
        for option in ("uid", "gid"):
            # Twistd fails for a user without a passwd entry, and believes what a system call says.
            if option in self._twistd:
                self._twistd[option] = None

    def expect_forks(self) -> None:
        """Prepare for the two forks by which twistd becomes a daemon. Nothing else is to fork before them."""
        self._forks = 2
        os.register_at_fork(after_in_parent=self._forked, after_in_child=self._forked_off)

    def _forked(self) -> None:
        """This process waits for the daemon now, at a pipe of which it has both ends, or exits.

        Twisted leaves it the end to write to: it would wait for ever for a daemon that is killed before it serves.
        """
        if self._forks:
            self._forks = 0
            for descriptor in range(3, self._next_descriptor()):
                with contextlib.suppress(OSError):
                    if _is_written(descriptor):
                        os.close(descriptor)

    @staticmethod
    def _next_descriptor() -> int:
        """A number above those of all descriptors that matter: they are given from the lowest one on."""
        descriptor = os.dup(2)
        os.close(descriptor)
        return descriptor

    def _forked_off(self) -> None:
        """This process is, or will be, the daemon."""
        if self._forks:
            self._forks -= 1
            signals.hold()

    def check(self) -> str | None:
        """Drop privileges; called when all is bound and nothing is served. Returns what is wrong, if anything is."""
        self._take_pipe()
        try:
            self._credentials.assume()
        except CredentialsError as error:
            return str(error)
        if self._credentials and self._log is not None:
            self._log.info("set uid/gid {uid}/{gid}", uid=self._credentials.uid, gid=self._credentials.gid)
        return None

    def report(self, problem: str | None) -> None:
        """The start is over, and went well or not."""
        self.over = True
        if self._hook is not None and sys.excepthook == self._uncaught:  # hosted code may have put its own in front
            sys.excepthook = self._hook
        self._take_pipe()
        if problem is None:
            self._answer(b"0")
        else:
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(self._terminal or 2, f"rtservice: {printable(problem)}\n".encode())
            # The command returns when all is cleaned up: who tries again at once finds no pidfile and no port in use.
            atexit.register(self._answer, b"1 rtservice did not start")
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def abandon(self, problem: str) -> None:
        """Report the problem, and leave nothing behind."""
        if self.service is not None:
            self.service.exit_status = self.service.exit_status or 1
            self.service.abandon()
        self.report(problem)

    def _uncaught(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if self.over and self._hook is not None:  # what hosted code has put in front calls this still
            self._hook(kind, error, traceback)
            return
        problem = _unexpected(error)
        if self._log is not None:
            self._log.failure("the start failed", Failure(error, kind, traceback), traceback_level(error))
        self.abandon(problem)

    def _answer(self, word: bytes) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                os.write(self._pipe, word)
            os.close(self._pipe)

    def _take_pipe(self) -> None:
        # When twistd daemonizes, the command that was typed waits at this pipe for a word. Twistd would say too early
        # that all is well, and of an error the first 98 bytes.
        if self._twistd.get("statusPipe") is not None:
            self._pipe, self._twistd["statusPipe"] = self._twistd["statusPipe"], None


def _is_written(descriptor: int) -> bool:
    """Whether it is the end of a pipe that is written to; raises OSError."""
    how = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return how == os.O_WRONLY and stat.S_ISFIFO(os.fstat(descriptor).st_mode)


def _unexpected(error: BaseException) -> str:
    """What nobody expected to be raised in a start, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if not isinstance(error, OSError) or error.errno is None:
        return f"cannot start: {hosting.told(error)}"
    where = "" if error.filename is None else f"{printable(str(error.filename))}: "
    more = ""
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        more = f"; the limit of descriptors (ulimit -n, LimitNOFILE=) is {limit}"
    return f"cannot start: {where}{_reason(error)}{more}"


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


@contextlib.contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Turn a ListenError into a SettingError that names the setting."""
    try:
        yield
    except ListenError as error:
        raise SettingError(f"{setting}: {error}") from None


def _check_other_types(loaded: LoadedSettings, slots: int) -> None:
    """Find the descriptions of a type that nobody knows, and those that exclude workers. Raises SettingError."""
    for description in loaded.settings.listen:
        with _naming(_described(loaded, "listen", description)):
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


def _install_reactor(log: Log) -> None:
    """Make our reactor the process's, unless it has one: chosen by the user, or by `twist`, which imports it early."""
    if "twisted.internet.reactor" in sys.modules:
        return
    try:
        from rtservice.net import reactor
    except ImportError as error:  # no epoll(7)
        log.warn(
            "{platform} has no reactor of ours ({error}): serving on Twisted's", platform=sys.platform, error=error
        )
    else:
        reactor.install()


def _path_resolver(twistd: Any) -> Callable[[str], str]:
    """Paths as twistd will see them once it has changed its root and its directory, which it has not yet."""
    root = twistd.get("chroot")
    directory = twistd.get("rundir") or "."
    if root is None:
        return lambda path: os.path.abspath(os.path.join(directory, path))
    # twistd starts in / of the new root unless --rundir says otherwise.
    return lambda path: os.path.join(
        os.path.abspath(root), os.path.normpath(os.path.join("/", directory, path)).lstrip("/")
    )


def _check_working_directory() -> None:
    """Reject one that is gone: relative paths, the pidfile's for one, begin nowhere then. Raises SettingError."""
    try:
        os.getcwd()
    except OSError as error:
        raise SettingError(
            f"the working directory cannot be used: {_reason(error)}; change to another directory first"
        ) from None


def _check_directories(twistd: Any, resolve_path: Callable[[str], str]) -> None:
    """Find where twistd itself would fail, with a traceback, when everything is bound already. Raises SettingError."""
    rundir = twistd.get("rundir")
    if twistd.get("chroot") is not None:
        _check_directory(f"--chroot {printable(twistd['chroot'])}", twistd["chroot"])
    elif rundir == ".":  # twistd's default, into which it changes, too
        _check_directory("the working directory", rundir, "; change to another, or name one with --rundir")
    elif rundir is not None:
        _check_directory(f"--rundir {printable(rundir)}", rundir)
    given = twistd.get("pidfile")
    if given:
        _check_pidfile(given, resolve_path)
        path = resolve_path(given)
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            raise SettingError(f"--pidfile {printable(given)}: no such directory: {printable(directory)}")
        if not os.access(path if os.path.exists(path) else directory, os.W_OK):
            raise SettingError(f"--pidfile {printable(given)}: permission denied")


def _check_directory(name: str, path: str, hint: str = "") -> None:
    """Find why a directory could not be the working directory of this process. Raises SettingError."""
    try:
        problem = "" if stat.S_ISDIR(os.stat(path).st_mode) else "not a directory"
    except FileNotFoundError:
        problem = "no such directory"
    except OSError as error:
        problem = _reason(error)
    if not problem and not os.access(path, os.X_OK, effective_ids=True):
        problem = "permission denied"
    if problem:
        raise SettingError(f"{name}: {problem}{hint}")


def _check_pidfile(given: str | None, resolve_path: Callable[[str], str]) -> None:
    """Reject what is at the path of the pidfile, if twistd would wait for ever there, or fail. Raises SettingError."""
    if not given:
        return
    name = f"--pidfile {printable(given)}"
    path = resolve_path(given)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device: to open one may take for ever
            raise SettingError(f"{name}: not a regular file")
        with open(path, "rb") as file:
            content = file.read(64)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingError(f"{name}: {_reason(error)}") from None
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content):
        raise SettingError(f"{name}: it holds no process id; remove it unless a service uses it")


def _check_changes(twistd: Any, credentials: Credentials, slots: int) -> None:
    """Find whether root and user can be changed as twistd is told to. Raises SettingError.

    Nothing is bound yet, and nothing of this can be taken back: a child process tries.
    """
    root, rundir = twistd.get("chroot"), twistd.get("rundir")
    if root is None and not credentials:
        return

    def change() -> str | None:
        if root is not None:
            name, what = f"--chroot {printable(root)}", "it takes root, or its capability sys_chroot"
            try:
                os.chroot(root)
                name, what = f"--rundir {printable(rundir)}", "in the new root"
                os.chdir("/" if rundir == "." else rundir)  # as twistd does
                if not twistd.get("nodaemon") or slots > 1:
                    name, what = f"--chroot {printable(root)}", "/dev/null, which daemons and workers need, is missing"
                    os.close(os.open(os.devnull, os.O_RDWR))
            except FileNotFoundError:
                return f"{name}: no such {'file or ' if 'dev' in what else ''}directory; {what}"
            except OSError as error:
                return f"{name}: {_reason(error)}; {what}"
        try:
            credentials.assume()
        except CredentialsError as error:
            return str(error)
        return None

    problem = problem_of(change)
    if problem is not None:
        raise SettingError(problem)


# Descriptors that a start takes after everything is bound, at the most at once: those by which the reactor hears of
# signals, the pidfile, the pipe of a daemon; and some for clients. Each worker has four pipes, and eight for a moment.
_DESCRIPTORS_LEFT, _WORKER_DESCRIPTORS, _SPAWN_DESCRIPTORS = 8, 4, 5


def _check_descriptors(slots: int, limit: int) -> None:
    """Find whether there are enough descriptors for what remains. Raises SettingError.

    Twisted's reactor would go on without hearing of signals, and a worker could not be spawned.
    """
    wanted = _DESCRIPTORS_LEFT + (_SPAWN_DESCRIPTORS + slots * _WORKER_DESCRIPTORS if slots > 1 else 0)
    held: list[int] = []
    try:
        while len(held) < wanted:
            held.append(os.dup(2))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise SettingError(
            f"the limit of descriptors (ulimit -n, LimitNOFILE=) is {limit}; "
            f"this service takes {limit + wanted - len(held)} at the least"
        ) from None
    finally:
        for descriptor in held:
            os.close(descriptor)


def _credentials(twistd: Any, log: Log) -> Credentials:
    """What --uid and --gid have the process run as.

    Rejects what cannot be, or would keep root within reach of hosted code. Raises SettingError.
    """
    uid, gid = twistd.get("uid"), twistd.get("gid")
    if twistd.get("euid") and (uid is not None or gid is not None):
        # The real user stays root, in workers too: seteuid(0), one call in hosted code, takes everything back.
        raise SettingError(
            "--euid: any code that is served could become root again, since only the effective user changes; "
            "leave it out, and --uid gives root up for good"
        )
    if gid is not None and uid is None and os.geteuid() == 0:
        log.warn(
            "--gid {gid} without --uid: what is served runs as root, with the supplementary groups of root", gid=gid
        )
    try:
        return resolve(uid, gid)
    except CredentialsError as error:
        raise SettingError(str(error)) from None


class ExitWithStatus:
    """Ends the process with the status of its service, if that is not 0: twistd's is 0, whatever stops its reactor."""

    service: Server | Supervisor | None = None
    outputs: _Outputs | None = None

    def __init__(self, start: StartReporter) -> None:
        self._start = start

    def __call__(self) -> None:
        if self.service is not None and not self._start.over:
            # Somebody has ended the process, or its reactor, in a way that nobody was told of.
            self._start.abandon("the process ended before it served")
        if self.service is not None and self.outputs is not None and self.service.exit_status:
            self.outputs.finish()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.service.exit_status)
