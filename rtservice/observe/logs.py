"""Log levels, log formats (classic, text, JSON) and the access log."""

from __future__ import annotations

import json as _json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

from twisted.logger import (
    ILogObserver,
    LogEvent,
    Logger,
    LogLevel,
    formatEvent,
    formatEventAsClassicLogText,
    formatTime,
)
from twisted.python.reflect import safe_str
from zope.interface import implementer

from rtservice.escaping import escaped
from rtservice.observe.lines import LineWriter, Stream

LevelName = Literal["debug", "info", "warn", "error", "critical"]

_LEVELS = tuple(LogLevel.iterconstants())

# --- levels ---


class Levels:
    """The minimum level of each namespace: that of the longest name in `least` that is a prefix of the namespace.

    Prefixes end at a dot: `twisted` is a prefix of `twisted.web`, not of `twistedish`. Records of other namespaces are
    all logged.
    """

    def __init__(self, least: Mapping[str, LevelName]) -> None:
        self.change(least)

    def change(self, least: Mapping[str, LevelName]) -> None:
        """Replace the minimum levels."""
        self._least = dict(least)
        self._enough: dict[Any, frozenset[Any]] = {}  # the logged levels by namespace

    def allow(self, namespace: Any, level: Any) -> bool:
        """Return whether a record with this namespace and level is logged."""
        enough = self._enough.get(namespace)
        if enough is None:
            if len(self._enough) > 1000:  # code may generate names
                self._enough.clear()
            enough = self._enough[namespace] = self._enough_of(str(namespace))
        return level in enough

    def _enough_of(self, namespace: str) -> frozenset[Any]:
        names = [name for name in self._least if f"{namespace}.".startswith(f"{name}.")]
        if not names:
            return frozenset((*_LEVELS, None))
        level = LogLevel.lookupByName(self._least[max(names, key=len)])
        return frozenset(_LEVELS[_LEVELS.index(level) :])


class Log(Logger):
    """Logger of rtservice's records. Passes those that `levels` allows to `observer`."""

    def __init__(self, levels: Levels, observer: ILogObserver) -> None:
        super().__init__("rtservice", observer=observer)
        self.levels = levels

    def emit(self, level: Any, format: str | None = None, **fields: Any) -> None:
        """Log as in Twisted, without its search for the level, which was half of the cost of a record."""
        if self.levels.allow("rtservice", level):
            # One by one: update() with keywords makes another dictionary first.
            fields["log_logger"] = self
            fields["log_level"] = level
            fields["log_namespace"] = "rtservice"
            fields["log_source"] = None
            fields["log_format"] = format
            fields["log_time"] = time.time()
            self.observer(fields)


# --- formats ---


@lru_cache(maxsize=4)
def _local_second(second: int) -> str:
    return formatTime(second)


@lru_cache(maxsize=4)
def _utc_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def utc_time(when: float) -> str:
    """Return a time, in seconds since the epoch, in the format of RFC 3339: `2026-11-24T22:38:12.000417Z`."""
    second, microseconds = divmod(round(when * 1_000_000), 1_000_000)
    return f"{_utc_second(second)}.{microseconds:06d}Z"


def _message(event: LogEvent) -> str:
    """Return the result of Twisted's formatEvent, usually faster."""
    template = event.get("log_format")
    # Twisted extends templates by calls, `{name()}`.
    if type(template) is str and "(" not in template and "log_flattened" not in event:
        try:
            return template.format_map(event)
        except Exception:  # formatEvent returns a text that describes the error
            pass
    return formatEvent(event)


def _classic(event: LogEvent) -> str:
    """Return exactly the line that twistd's own observers write."""
    when = event.get("log_time")
    system = event.get("log_system")
    if when is None or "log_failure" in event or not (system is None or isinstance(system, str)):
        return formatEventAsClassicLogText(event) or ""
    message = _message(event)
    if not message:
        return ""
    if system is None:
        level = event.get("log_level")
        system = f"{event.get('log_namespace', '-')}#{'-' if level is None else level.name}"
    if "\n" in message:
        message = message.replace("\n", "\n\t")
    return f"{_local_second(math.floor(when))} [{system}] {message}\n"


# The standard keys of an event of twisted.python.log.
_LEGACY = frozenset(("time", "message", "system", "isError", "format", "failure", "why", "printed", "logLevel"))


def message_and_traceback(event: LogEvent) -> tuple[str, str]:
    """Return the text of a record, and its traceback or ""."""
    failure = event.get("log_failure")
    if failure is None and event.get("isError") and "failure" in event:
        failure = event["failure"]
        message = safe_str(event.get("why") or "Unhandled Error")
    else:
        message = _message(event)
    if failure is None:
        return message, ""
    try:
        return message, failure.getTraceback()
    except Exception as error:  # the repr of a value in it may fail
        return message, f"(no traceback: {safe_str(error)})"


# Fields that stand before all others.
_FIRST = ("event", "slot")


def _as_json_value(thing: object) -> str:
    return thing.decode("utf-8", "backslashreplace") if isinstance(thing, bytes) else safe_str(thing)


# Non-ASCII characters are escaped: some readers treat U+2028 as the end of a line, and terminals execute U+009B.
_ascii = _json.JSONEncoder(default=_as_json_value, allow_nan=False).encode
_unicode = _json.JSONEncoder(default=_as_json_value, allow_nan=False, ensure_ascii=False).encode
_SURROGATE = re.compile("[\ud800-\udfff]")


def _encoded(value: object) -> str:
    r"""Encode a value as JSON in one line. A lone surrogate, which is no text, becomes the six characters `\udc80`."""
    try:
        text = _ascii(value)
        if "\\ud" in text:
            whole = _SURROGATE.sub(lambda match: f"\\\\u{ord(match[0]):04x}", _unicode(value))
            text = _ascii(_json.loads(whole))
    except Exception:  # a circular reference, NaN, a key that is no text, or too many levels
        return _encoded(safe_str(value))
    return text


def _json_line(event: LogEvent) -> str:
    """Return a JSON object: `time`, `level`, `namespace`, `message`, `event`, `slot`, other fields, `traceback`."""
    message, traceback = message_and_traceback(event)
    level = event.get("log_level")
    shown: dict[str, Any] = {
        "time": utc_time(event.get("log_time") or time.time()),
        "level": "info" if level is None else level.name,
        "namespace": event.get("log_namespace", "-"),
        "message": message,
    }
    legacy = "isError" in event and "system" in event
    template = event.get("log_format")
    for name in _FIRST:
        if name in event and (name == "slot" or template != f"{{{name}}}"):
            shown[name] = event[name]
    for name, value in event.items():
        if name[:4] == "log_" or (legacy and name in _LEGACY) or name in _FIRST or template == f"{{{name}}}":
            continue
        # A field of the event may have the name of a standard field.
        shown[f"{name}_" if name in ("time", "level", "namespace", "message", "traceback") else name] = value
    if traceback:
        shown["traceback"] = traceback
    try:
        line = _ascii(shown)
    except Exception:
        line = ""
    if not line or "\\ud" in line:
        line = f"{{{', '.join(f'{_encoded(str(name))}: {_encoded(value)}' for name, value in shown.items())}}}"
    return f"{line}\n"


_COLOURS = {"debug": "2", "warn": "33", "error": "31", "critical": "1;31"}  # ECMA-48, section 8.3.117 (SGR)


def _text_line(event: LogEvent, coloured: bool = False) -> str:
    """Return time, level, namespace and message. Further lines of the message and a traceback are indented."""
    message, traceback = message_and_traceback(event)
    first, *more = [escaped(line) for line in f"{message}\n{traceback}".rstrip("\n").split("\n")]
    level = event.get("log_level")
    name = "info" if level is None else level.name
    when = utc_time(event.get("log_time") or time.time())
    source = escaped(str(event.get("log_namespace", "-")))
    if "slot" in event:
        source += f" worker {event['slot']}"
    if not coloured:
        line = f"{when} {name:8} {source}: {first}"
    else:
        line = f"\x1b[2m{when}\x1b[m {name:8} \x1b[36m{source}\x1b[m: {first}"
        if name in _COLOURS:
            line = line.replace(f" {name:8} ", f" \x1b[{_COLOURS[name]}m{name:8}\x1b[m ", 1)
    return "\n    ".join((line, *more)) + "\n"


# --- observers ---


@implementer(ILogObserver)
class Observer:
    """Writes the records that `levels` allows, formatted by `line`, to `lines`."""

    def __init__(self, line: Callable[[LogEvent], str], lines: LineWriter, levels: Levels) -> None:
        self._line = line
        self._put = lines.put
        self._levels = levels

    def __call__(self, event: LogEvent) -> None:
        level = event.get("log_level")
        if self._levels.allow(event.get("log_namespace"), level):
            line = self._line(event)
            if line:
                self._put(line, at_once=level in _URGENT)


_URGENT = frozenset((LogLevel.error, LogLevel.critical))


class Format:
    """A log format for `twistd --logger`: a call without arguments returns an observer.

    The observer writes to standard output, or to the lines given to `write_to`, since twistd does not pass its other
    options.
    """

    def __init__(self, line: Callable[[LogEvent], str], coloured: Callable[[LogEvent], str] | None = None) -> None:
        self._lines: LineWriter | None = None
        self._levels = Levels({})
        self._line = line
        self._coloured = coloured

    def write_to(self, lines: LineWriter, levels: Levels) -> None:
        """Have the observers that are made from now on write what `levels` allow to `lines`."""
        self._lines, self._levels = lines, levels

    def __call__(self) -> Observer:
        # twistd imports the reactor at this moment too.
        from twisted.internet import reactor

        lines = self._lines or LineWriter(standard_output())
        if self._lines is None:
            lines.start(reactor)
        colour = self._coloured is not None and os.isatty(lines.fileno()) and not os.environ.get("NO_COLOR")
        return Observer(self._coloured if self._coloured is not None and colour else self._line, lines, self._levels)


def standard_output() -> Stream:
    """Return a Stream of standard output, or one that drops everything if that is closed."""
    # If standard output was closed, descriptor 1 may now be another file. Writing to a read-only descriptor fails.
    descriptor = 1 if sys.__stdout__ is not None else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return Stream(descriptor, "standard output")


json = Format(_json_line)
text = Format(_text_line, lambda event: _text_line(event, coloured=True))
classic = Format(_classic)


# --- access log ---


@lru_cache(maxsize=256)
def _quoted(value: str) -> str:
    """Return a value of `name=value` unchanged, or as a JSON string if it has other characters."""
    return value if re.fullmatch(r"[\w.:/@,+*\[\]-]+", value, re.ASCII) else _json.dumps(value)


class AccessLog:
    """Calls `put` with a line for each ended connection. `slot` is the number of the worker; None without workers."""

    def __init__(self, put: Callable[[str], None], slot: int | None = None) -> None:
        self._put = put
        self._end = f"worker={'-' if slot is None else slot}\n"

    def __call__(self, peer: str, listener: str, seconds: float, bytes_in: int, bytes_out: int, reason: str) -> None:
        """Write the line of a connection that ended now and lasted `seconds`."""
        self._put(
            f"start={utc_time(time.time() - seconds)} peer={_quoted(peer)} listener={_quoted(listener)} "
            f"seconds={seconds:.3f} in={bytes_in} out={bytes_out} reason={_quoted(reason)} {self._end}"
        )
