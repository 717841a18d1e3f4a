"""A protocol that sends invalid, excessive or hostile messages from its worker to the supervisor."""

import contextlib
import json
import os
import select
import threading

from twisted.internet.protocol import Protocol
from twisted.logger import Logger

log = Logger(namespace="mad")


def push(data, descriptor=4):
    """Write all data, and wait as long as necessary."""
    while data:
        select.select([], [descriptor], [])
        with contextlib.suppress(BlockingIOError):
            data = data[os.write(descriptor, data) :]


def say(word, value=None):
    push(f"{word} {json.dumps(value)}\n".encode())


def record(text="text", fields=None, when=5.0, level="info", namespace="mad", traceback=""):
    say("records", [[level, namespace, when, text, traceback, fields or {}]])


def forever(function, *arguments):
    while True:
        function(*arguments)


def width():
    event = {"log_format": "{a:>2000000000}", "a": 1, "log_namespace": "mad", "log_time": 5.0}
    push(b"log " + json.dumps(event).encode() + b"\n")


def names():
    for start in range(0, 200_000, 100):
        say("beat", {f"invented{number}": 1 for number in range(start, start + 100)})


def labels():
    for number in range(200_000):
        say("beat", {f"protocol\tname{number}\t": 1})


def flood_of_records():
    line = b'records [["info", "mad", 5.0, "a flood", "", {}]]\n'
    forever(push, line * 100)


def flood_of_text():
    forever(push, f"records {json.dumps([['info', 'mad', 5.0, chr(1) * 16_000, '', {}]])}\n".encode())


def flood_of_batches():
    forever(say, "records", [["info", "mad", 5.0, "", "", {}]] * 100)


def deaf():
    from twisted.internet import reactor

    for reader in reactor.getReaders():
        if reader.fileno() == 3:
            reactor.removeReader(reader)


ATTACKS = {
    "format": width,
    "names": names,
    "labels": labels,
    "long": lambda: say("beat", {f"invented{number}": 1 for number in range(200_000)}),
    "partial": lambda: forever(push, b"x" * 65536),
    "binary": lambda: forever(push, os.urandom(65536)),
    "deep": lambda: push(b"beat " + b"[" * 60_000 + b"\n"),
    "digits": lambda: push(b'beat {"open": ' + b"9" * 60_000 + b"}\n"),
    "nan": lambda: push(b'beat {"open": NaN}\n'),
    "ready": lambda: forever(say, "ready"),
    "failed": lambda: say("failed", "x"),
    "time": lambda: record(when=1e300),
    "level": lambda: record(level="loud"),
    "answer": lambda: say("rows", {"id": 1, "rows": [["a", "b", "open", 1, None, 1, 1]] * 500}),
    "legacy": lambda: record(fields={"format": "%(a)2000000000d", "a": 1}),
    "negative": lambda: say("beat", {"lag_us": -5}),
    "drain": lambda: say("drain", []),
    # no protocol violations
    "records": flood_of_records,
    "text": flood_of_text,
    "batches": flood_of_batches,
    "heartbeats": lambda: forever(push, b"beat {}\n" * 1000),
    "leave": lambda: forever(push, b"leave null\n" * 1000),
    "print": lambda: forever(push, b"\x00" * 65536, 1),
    "lines": lambda: forever(push, b"\n" * 65536, 2),
    "deaf": deaf,
    "escapes": lambda: (
        record("\x1b[2Jforged\x07\n2026-01-01 forged\x9b", traceback="\x1b]0;title\x07", namespace="\x1b[31m\nmad"),
        log.info("by itself \x1b[31m {name}", name="\x1b]0;"),
        os.write(2, b"printed \x1b[31m\xff\n"),
    ),
    "large": lambda: log.info("{a:>20000000}{b}", a=1, b=["x" * 1_000_000] * 10, c={n: n for n in range(100_000)}),
}


class Mad(Protocol):
    def dataReceived(self, data):
        name = data.decode().strip()
        if name == "pid":
            self.transport.write(b"%d\n" % os.getpid())
        elif name == "large" or name == "deaf" or name == "escapes":
            ATTACKS[name]()
        else:
            threading.Thread(target=ATTACKS[name], daemon=True).start()
