"""The files and streams to which the main process writes lines: its log and the access log."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from rtservice.config.sources import LoadedSettings
from rtservice.config.values import SettingError
from rtservice.escaping import escaped
from rtservice.events import LOG_FILES_KEPT
from rtservice.observe import logs
from rtservice.observe.lines import LineWriter, Output, write_to_stderr
from rtservice.observe.logfile import LogFile
from rtservice.observe.logs import Format, Log
from rtservice.process import signals


class Outputs:
    """Opens the log and the access log before privileges are dropped. The constructor raises SettingError.

    `format` creates the observer with which twistd logs. None leaves the choice to twistd, as for `--syslog`. The
    observer writes the same lines to the same file as twistd's observers. Those make a system call for each record,
    block on a pipe that is not read, and raise an exception when a disk is full.
    """

    def __init__(self, loaded: LoadedSettings, twistd: Any, resolve_path: Callable[[str], str], log: Log) -> None:
        self.format: Format | None = None
        self.access: LineWriter | None = None
        self._lines: list[LineWriter] = []
        # If the log is standard output, its reader probably reads standard error too.
        self._aside: Callable[[str], None] | None = write_to_stderr
        chosen = twistd.get("logger")
        main: LineWriter | None = None
        if isinstance(chosen, Format) or ("logger" in twistd and chosen is None and not twistd["syslog"]):
            log_format = chosen or logs.classic
            self.format = None if chosen else log_format
            file = twistd["logfile"] or ("-" if twistd["nodaemon"] else "twistd.log")
            if file == "-":
                self._aside = None
            with opening("--logfile", file):
                # As twistd does.
                output = self._output(file, twistd, rotated=loaded.settings.log_files, mode=0o666)
                main = self._start(output)
            log_format.write_to(main, log.levels)
            if isinstance(output, LogFile) and output.beyond:
                LOG_FILES_KEPT.log(log, file=output.beyond, count=loaded.settings.log_files)
        file = loaded.settings.access_log
        if file:
            with opening(loaded.where("access-log"), file):
                path = file if file == "-" else resolve_path(file)
                # One writer if both are the same file, so that lines are not mixed and the file is rotated once.
                shared = main is not None and _same_file(1 if file == "-" else path, main.fileno())
                self.access = main if shared else self._start(self._output(path, twistd))
        before = signals.handler(signal.SIGUSR1)
        self._before = before if callable(before) else None
        signal.signal(signal.SIGUSR1, self._signalled)

    def dropped(self) -> int:
        """Return the number of dropped lines."""
        return sum(lines.dropped for lines in self._lines)

    def _output(self, file: str, twistd: Any, **how: int) -> Output:
        if file != "-":
            return LogFile(os.path.abspath(file), **how)
        if "nodaemon" in twistd and not twistd["nodaemon"]:
            raise SettingError("a daemon has no standard output; use a file, or --nodaemon")
        return logs.standard_output()

    def _start(self, output: Output) -> LineWriter:
        from twisted.internet import reactor

        lines = LineWriter(output, aside=self._aside)
        lines.start(reactor)
        self._lines.append(lines)
        return lines

    def _signalled(self, number: int, frame: Any) -> None:
        from twisted.internet import reactor

        for lines in self._lines:  # separate calls: an error in one does not affect the others
            reactor.callFromThread(lines.reopen)  # type: ignore[attr-defined]  # the module stands for the object
        if self._before is not None:
            self._before(number, frame)

    def finish(self) -> None:
        """Write the remaining lines."""
        for lines in self._lines:
            lines.finish()


def _same_file(file: str | int, descriptor: int) -> bool:
    """Whether a path or a descriptor is the file of a descriptor."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except OSError:
        return False


@contextlib.contextmanager
def opening(setting: str, file: str) -> Iterator[None]:
    """Turn an OSError into a SettingError that names the setting and the file."""
    try:
        yield
    except OSError as error:
        raise SettingError(f"{setting} {escaped(file)}: cannot be written: {error.strerror}") from None
    except SettingError as error:
        raise SettingError(f"{setting} {escaped(file)}: {error}") from None
