"""The entry point of `twistd rtservice`: the command line, and the service. Workers start in `pool.worker`."""

from __future__ import annotations

import rtservice.first  # noqa: F401  # handles signals to process 1 before the slow imports

# isort: split

import atexit
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from twisted.logger import globalLogPublisher
from twisted.python import usage

from rtservice import __version__
from rtservice.config.render import as_toml
from rtservice.config.schema import Setting, Settings, all_settings
from rtservice.config.sources import CONFIG_VARIABLE, LoadedSettings, variable
from rtservice.config.usage import Entry, usage_text
from rtservice.config.values import FLAG, SettingError
from rtservice.escaping import escaped
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.listing import listing
from rtservice.hosting.names import SHIPPED
from rtservice.hub.carrier import HEARTBEATS
from rtservice.hub.choice import warn_if_unused
from rtservice.hub.hub import Hub
from rtservice.net.listener import Listener
from rtservice.net.tls import TLSError, ignore_bad_names
from rtservice.observe.logs import AccessLog, Levels, Log
from rtservice.pool import worker
from rtservice.pool.pool import WorkerPool
from rtservice.process import signals, systemd
from rtservice.process.counters import DURATIONS, LAGS
from rtservice.process.endpoints import Endpoints
from rtservice.process.registry import COLUMNS
from rtservice.process.server import Server, descriptors_for_status, raise_descriptor_limit
from rtservice.process.service import Launch, ServiceProcess
from rtservice.process.status_server import StatusServer
from rtservice.process_settings import levels, process_count, runtime_settings
from rtservice.startup.binding import check_configuration, open_listeners
from rtservice.startup.first_steps import first_steps
from rtservice.startup.hub_url import carrier_of_process, warn_of_visible_password
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
from rtservice.startup.reload import CurrentSettings, ReloadServer, ReloadWorkers, worker_spec
from rtservice.startup.settings_source import SettingsSource
from rtservice.startup.start import ExitWithStatus, StartReporter, unexpected
from rtservice.suggestions import did_you_mean, nearest

# Every setting of the command line: those of the schema, and the aliases of options of shipped protocols.
_SETTINGS = tuple(all_settings(ALIASES))


class _Printed(SystemExit):
    """Exit after printing a text: with status 0, or with an error line if the text cannot be written."""

    def __init__(self, text: str) -> None:
        try:
            # In UTF-8, the encoding of TOML, whatever the terminal uses. sys.stdout is None if it is closed.
            with open(1, "wb", closefd=False) as output:
                output.write(text.encode())
        except OSError as error:
            super().__init__(f"rtservice: cannot write to standard output: {error.strerror}")
        else:
            super().__init__(0)


class Options(usage.Options):
    """The command line of `twistd rtservice`, generated from the schema, and the settings from all sources.

    `options["check"]` is whether only to check the settings.
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

    source: SettingsSource
    loaded: LoadedSettings
    start: StartReporter

    def opt_version(self) -> None:
        """Print the version and exit."""
        raise _Printed(f"rtservice {__version__}\n")

    def opt_help(self) -> None:
        """Display this help and exit."""
        raise _Printed(f"{self}\n")

    def getUsage(self, width: int | None = None) -> str:
        """Return the text of --help for a terminal of `width` columns; default: COLUMNS, or else 80."""
        if width is None:
            columns = os.environ.get("COLUMNS", "")
            width = int(columns) if re.fullmatch("[0-9]{1,6}", columns) else 80
        names = {"config": " FILE", "check": "", "print-config": "", "version": "", "help": ""}
        entries = [Entry(f"--{name}{metavar}", self.docs[name].strip()) for name, metavar in names.items()]
        return usage_text(_SETTINGS, entries, width)

    def parseOptions(self, options: Iterable[str] | None = None) -> None:
        """Parse as Twisted does, but report an error as one line, without the help text."""
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            hint = self._hint(str(error))
            raise SystemExit(f"rtservice: {escaped(str(error))}{escaped(hint)} (see twistd rtservice --help)") from None
        except SettingError as error:
            raise SystemExit(f"rtservice: {error}") from None

    def _hint(self, problem: str) -> str:
        """Return the end of an error that suggests an option instead of an unknown one, or an empty text."""
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
        """Reject arguments that are not options. Raises usage.UsageError."""
        if args and (self.get("protocol-option") or self.get("hub")):  # most often the second half of a value
            raise usage.UsageError(
                "unexpected argument, not shown as it may be a secret; put quotes around an option with blanks"
            )
        if args:
            raise usage.UsageError(f"unexpected argument {args[0]!r}")

    def postOptions(self) -> None:
        """Load the settings. Exits if the command only prints something. Raises SettingError."""
        twistd: Any = self.parent or {}
        self.start = StartReporter(twistd)
        if self.parent is not None:  # None in a program that calls makeService itself
            self.start.watch()
        check_working_directory()
        environment = dict(os.environ)
        for name, path in (("--config", self["config"]), (CONFIG_VARIABLE, environment.get(CONFIG_VARIABLE))):
            if path is not None:
                if not path:
                    raise SettingError(f"{name}: the value is empty")
                # A daemon changes its working directory, and a reload reads the file again.
                self["config"] = os.path.abspath(path)
                break
        # twistd opens the pidfile next. A relative path is checked before the working directory changes.
        check_pidfile(twistd.get("pidfile"), os.path.abspath)
        self.source = SettingsSource(
            given={setting.name: self[setting.name] for setting in _SETTINGS if self.get(setting.name) is not None},
            environment=environment,
            file=self["config"],
            started_in=os.path.abspath("."),
            directory=os.path.abspath(twistd.get("rundir") or "."),  # to which twistd changes later
        )
        self.loaded = self.source.read()
        if self.settings().protocol == "help":
            raise _Printed(listing())
        if self["print-config"]:
            raise _Printed(as_toml(self.loaded, SHIPPED))

    def settings(self) -> Settings:
        """Return the settings of the start."""
        return self.loaded.settings


def _option_name(option: str) -> str:
    """Return the name of an option as users type it. `option` is an entry of usage.Options.longOpt."""
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
            setattr(Options, f"opt_{_name}", _opt)  # to Twisted, a second name is a synonym


def makeService(options: Options) -> ServiceProcess:
    """Validate the settings, bind every socket, and return the service.

    Sockets are bound here, before twistd daemonizes, drops privileges or opens its log. So an error is one line on the
    terminal, and the command exits with status 1. Raises SystemExit with that line, after it has closed all sockets and
    removed their files.
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
        bound.pop_all()  # the service closes them from here on
    return service


def _make_service(options: Options, bound: contextlib.ExitStack) -> ServiceProcess:
    """Return the service. Raises SettingError. `bound` gets the functions that close the sockets after an error."""
    loaded, source = options.loaded, options.source
    twistd: Any = options.parent or {}
    signals.reset_inherited_signals()
    leave = ExitWithStatus(options.start)
    atexit.register(leave)  # first, so that it is called last: a protocol may register functions when it is imported
    # They may contain secrets, and processes that hosted code starts inherit the environment. A reload uses a copy.
    for name in ("protocol-option", "hub"):
        os.environ.pop(variable(name), None)
    open_standard_descriptors()
    ignore_bad_names()
    log = Log(Levels(levels(loaded.settings)), globalLogPublisher)
    slots = process_count(loaded.settings)
    resolve_path = path_resolver(twistd)
    credentials = credentials_of(twistd, log)
    check_directories(twistd, resolve_path)
    check_changes(twistd, credentials, slots)
    # Before the protocol is imported, since it may import the reactor.
    install_reactor(log)
    if slots == 1 or options["check"]:
        factory = source.make_factory(loaded, slots)
    else:  # the workers import the protocol, with their privileges; a missing file of an option is an error here
        factory = None
        source.protocol_options(loaded)
    url = source.hub_url(loaded)
    carrier = carrier_of_process(loaded, url, log)
    if options["check"]:
        check_configuration(loaded, resolve_path, slots)
        raise _Printed("rtservice: the configuration is valid\n")
    warn_of_visible_password(loaded, log)
    if slots == 1:
        warn_if_unused(url, factory, log)
    notifier = systemd.from_environment(os.environ)
    nodaemon = twistd.get("nodaemon", True)
    if nodaemon:
        signals.hold()
    descriptors = raise_descriptor_limit()  # the sockets and pipes of many slots exceed the usual limit of 1024
    outputs = Outputs(loaded, twistd, resolve_path, log)
    opened, endpoints, status = open_listeners(loaded, resolve_path, slots if slots > 1 else 0)
    for listener in (*opened, *status):
        bound.callback(listener.close)
    options.start.prepare(credentials, log)
    settings = CurrentSettings(loaded, source, resolve_path)
    status_server = StatusServer(log, status, descriptors_for_status(descriptors))
    backend: Server | WorkerPool
    reload: ReloadServer | ReloadWorkers
    if slots > 1:
        backend = _make_pool(loaded, source, opened, slots, outputs, log)
        reload = ReloadWorkers(settings, backend, status_server, log)
    else:
        backend = Server(
            factory,
            listeners=opened,
            settings=runtime_settings(loaded.settings, reserved=status_server.descriptors),
            log=log,
            hub=Hub(carrier, log),
            endpoints=Endpoints(endpoints, loaded.where("listen"), log),
            record=None if outputs.access is None else AccessLog(outputs.access.put),
        )
        reload = ReloadServer(settings, backend, status_server, log)
    launch = Launch(
        check=options.start.check,
        report=options.start.report,
        exit_now=leave,
        notifier=notifier,
        dropped=outputs.dropped,
        protocol=escaped(loaded.settings.protocol),
        hint=first_steps(
            loaded.settings.protocol,
            [listener.name for listener in opened],
            terminal=nodaemon and os.isatty(0),
        ),
        log_observer=outputs.format,
    )
    service = ServiceProcess(
        backend,
        reload,
        log=log,
        launch=launch,
        status_server=status_server,
        make_site=lambda service: _make_site(service, settings),
    )
    check_descriptors(slots, descriptors)
    if not nodaemon:  # signals are held from the first fork on, so the waiting command can still be interrupted
        options.start.expect_forks()
    leave.take(service, outputs)
    return service


def _make_pool(
    loaded: LoadedSettings, source: SettingsSource, opened: list[Listener], slots: int, outputs: Outputs, log: Log
) -> WorkerPool:
    try:
        spec = worker_spec(loaded, opened, source)
    except TLSError as error:  # a file has changed since it was checked
        raise SettingError(str(error)) from None
    return WorkerPool(
        listeners=opened,
        slots=slots,
        spec=spec,
        command=[sys.executable, *_interpreter_flags(), "-P", "-m", worker.__name__],
        log=log,
        access=None if outputs.access is None else outputs.access.put,
    )


def _interpreter_flags() -> list[str]:
    """Return the flags of this interpreter, such as -O and -X dev, for the interpreters of workers."""
    # This private function is what multiprocessing uses. The flags are spread over half a dozen places.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # not in typeshed
    return flags


def _make_site(service: ServiceProcess, settings: CurrentSettings) -> Any:
    """Return the factory of the status server, which shows this service."""
    from twisted.internet import reactor

    from rtservice.observe.site import make_site
    from rtservice.observe.status_source import StatusSource

    source = StatusSource(
        version=__version__,
        standing=lambda: service.standing,
        overview=service.overview,
        rows=service.rows,
        settings=settings.shown,
        refresh=service.refresh,
        hosts=settings.status_hosts,
        columns=COLUMNS,
        durations=DURATIONS,
        lags=LAGS,
        heartbeats=HEARTBEATS,
    )
    return make_site(source, reactor)
