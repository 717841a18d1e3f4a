"""Which records are logged, and what they look like: for people, for machines, and one line for each connection."""

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

from rtservice.observe.lines import LineWriter, Stream

LevelName = Literal["debug", "info", "warn", "error", "critical"]

_LEVELS = tuple(LogLevel.iterconstants())

# --- which records ---


class Levels:
    """The least level of each namespace: a record's is that of the longest name in `least` that is its, or begins it.

    Of a namespace that none of them begins, every record is logged. Names are whole up to a dot: `twisted` is the
    beginning of `twisted.web`, and not of `twistedish`.
    """

    def __init__(self, least: Mapping[str, LevelName]) -> None:
        self.change(least)

    def change(self, least: Mapping[str, LevelName]) -> None:
        """Go by these from now on."""
        self._least = dict(least)
        self._enough: dict[Any, frozenset[Any]] = {}  # by namespace

    def allow(self, namespace: Any, level: Any) -> bool:
        """Whether a record is logged, by the namespace and the level that it says it has."""
        enough = self._enough.get(namespace)
        if enough is None:
            if len(self._enough) > 1000:  # names may be made up as they come
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
    """A logger of rtservice's own records; `observer` takes those that `levels` allow."""

    def __init__(self, levels: Levels, observer: ILogObserver) -> None:
        super().__init__("rtservice", observer=observer)
        self.levels = levels

    def emit(self, level: Any, format: str | None = None, **fields: Any) -> None:
        """As in Twisted, which looks for the level among all of them: that was half of what a record cost."""
        if self.levels.allow("rtservice", level):
            fields.update(
                log_logger=self,
                log_level=level,
                log_namespace="rtservice",
                log_source=None,
                log_format=format,
                log_time=time.time(),
            )
            self.observer(fields)


# --- what they look like ---


@lru_cache(maxsize=4)
def _local_second(second: int) -> str:
    return formatTime(second)


@lru_cache(maxsize=4)
def _utc_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def utc_time(when: float) -> str:
    """A time, in seconds since 1970, as RFC 3339 has it, with microseconds: `2026-11-24T22:38:12.000417Z`."""
    second, microseconds = divmod(round(when * 1_000_000), 1_000_000)
    return f"{_utc_second(second)}.{microseconds:06d}Z"


def _message(event: LogEvent) -> str:
    """What Twisted's formatEvent gives, and most often sooner."""
    template = event.get("log_format")
    # Twisted's own extension of templates is a call, `{name()}`.
    if type(template) is str and "(" not in template and "log_flattened" not in event:
        try:
            return template.format_map(event)
        except Exception:  # it has a text for that
            pass
    return formatEvent(event)


def _classic(event: LogEvent) -> str:
    """The line that twistd's own observers write, exactly."""
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


# What an event of twisted.python.log has beside its own fields.
_LEGACY = frozenset(("time", "message", "system", "isError", "format", "failure", "why", "printed", "logLevel"))


def message_and_traceback(event: LogEvent) -> tuple[str, str]:
    """The text of a record without a traceback, and that."""
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
    except Exception as error:  # one of the values that it shows may be broken
        return message, f"(no traceback: {safe_str(error)})"


def _as_json_value(thing: object) -> str:
    return thing.decode("utf-8", "backslashreplace") if isinstance(thing, bytes) else safe_str(thing)


# What is not ASCII is escaped: some readers take U+2028 for the end of a line, and terminals obey U+009B.
_ascii = _json.JSONEncoder(default=_as_json_value, allow_nan=False).encode
_unicode = _json.JSONEncoder(default=_as_json_value, allow_nan=False, ensure_ascii=False).encode
_SURROGATE = re.compile("[\ud800-\udfff]")


def _encoded(value: object) -> str:
    r"""JSON of a value, as a line. Half a surrogate pair, which is no text, becomes the six characters `\udc80`."""
    try:
        text = _ascii(value)
        if "\\ud" in text:
            whole = _SURROGATE.sub(lambda match: f"\\\\u{ord(match[0]):04x}", _unicode(value))
            text = _ascii(_json.loads(whole))
    except Exception:  # it holds itself, or NaN, or keys that are no text, or is too deep
        return _encoded(safe_str(value))
    return text


def _json_line(event: LogEvent) -> str:
    """One JSON object: `time`, `level`, `namespace`, `message`, the event's own fields, and `traceback`."""
    message, traceback = message_and_traceback(event)
    level = event.get("log_level")
    shown: dict[str, Any] = {
        "time": utc_time(event.get("log_time") or time.time()),
        "level": "info" if level is None else level.name,
        "namespace": event.get("log_namespace", "-"),
        "message": message,
    }
    legacy = "isError" in event and "system" in event
    told = event.get("log_format")
    if "slot" in event:
        shown["slot"] = event["slot"]
    for name, value in event.items():
        if name[:4] == "log_" or (legacy and name in _LEGACY) or name == "slot" or told == f"{{{name}}}":
            continue
        # A field may be called as one of ours.
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


def _escaped(text: str) -> str:
    """Nothing that a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _text_line(event: LogEvent, coloured: bool = False) -> str:
    """Time, level, where it comes from, and the message; what that has of more lines, and a traceback, is indented."""
    message, traceback = message_and_traceback(event)
    first, *more = [_escaped(line) for line in f"{message}\n{traceback}".rstrip("\n").split("\n")]
    level = event.get("log_level")
    name = "info" if level is None else level.name
    when = utc_time(event.get("log_time") or time.time())
    source = _escaped(str(event.get("log_namespace", "-")))
    if "slot" in event:
        source += f" worker {event['slot']}"
    if not coloured:
        line = f"{when} {name:8} {source}: {first}"
    else:
        line = f"\x1b[2m{when}\x1b[m {name:8} \x1b[36m{source}\x1b[m: {first}"
        if name in _COLOURS:
            line = line.replace(f" {name:8} ", f" \x1b[{_COLOURS[name]}m{name:8}\x1b[m ", 1)
    return "\n    ".join((line, *more)) + "\n"


# --- where they go ---


@implementer(ILogObserver)
class Observer:
    """Writes the records that `levels` allow, as lines."""

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
    """What `twistd --logger` takes: called without arguments, it gives an observer.

    That writes to `lines`, or to standard output without. It is set, and `levels` too, by who knows twistd's other
    options, which twistd does not hand on.
    """

    def __init__(self, line: Callable[[LogEvent], str], coloured: Callable[[LogEvent], str] | None = None) -> None:
        self.lines: LineWriter | None = None
        self.levels = Levels({})
        self._line = line
        self._coloured = coloured

    def __call__(self) -> Observer:
        # As twistd itself does at this moment.
        from twisted.internet import reactor

        lines = self.lines or LineWriter(standard_output())
        if self.lines is None:
            lines.start(reactor)
        colour = self._coloured is not None and os.isatty(lines.fileno()) and not os.environ.get("NO_COLOR")
        return Observer(self._coloured if self._coloured is not None and colour else self._line, lines, self.levels)


def standard_output() -> Stream:
    """Standard output, whatever it is."""
    # If it was closed, 1 is now something else that was opened, and what can only be read is as good.
    descriptor = 1 if sys.__stdout__ is not None else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return Stream(descriptor, "standard output")


json = Format(_json_line)
text = Format(_text_line, lambda event: _text_line(event, coloured=True))
classic = Format(_classic)


# --- one line for each connection ---


@lru_cache(maxsize=256)
def _quoted(value: str) -> str:
    """A value of `name=value`: as it is, or as a JSON string."""
    return value if re.fullmatch(r"[\w.:/@,+*\[\]-]+", value, re.ASCII) else _json.dumps(value)


class AccessLog:
    """Makes a line of each connection, and hands it to `put`; `slot` is that of the worker, if there are any."""

    def __init__(self, put: Callable[[str], None], slot: int | None = None) -> None:
        self._put = put
        self._end = f"worker={'-' if slot is None else slot}\n"

    def __call__(self, peer: str, listener: str, seconds: float, bytes_in: int, bytes_out: int, reason: str) -> None:
        """A connection has ended, which began `seconds` ago."""
        self._put(
            f"start={utc_time(time.time() - seconds)} peer={_quoted(peer)} listener={_quoted(listener)} "
            f"seconds={seconds:.3f} in={bytes_in} out={bytes_out} reason={_quoted(reason)} {self._end}"
        )
