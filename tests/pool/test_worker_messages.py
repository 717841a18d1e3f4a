"""Messages that a worker may send to its supervisor: a table of cases, and random bytes."""

import contextlib
import json
import random
import time
import tracemalloc
from typing import Any

import pytest
from twisted.logger import Logger, LogLevel

from rtservice.events import DRAIN_DONE
from rtservice.pool import worker_messages
from rtservice.pool.control import LONGEST_FROM_WORKER, ProtocolViolation, encode
from rtservice.pool.log_records import as_event
from rtservice.pool.worker_messages import (
    DEEPEST,
    LATEST,
    LONGEST_NAME,
    LONGEST_NAMESPACE,
    LONGEST_TEXT,
    LONGEST_TRACEBACK,
    LONGEST_VALUE,
    MOST_COUNTERS,
    MOST_FIELDS,
    MOST_LINES,
    MOST_RECORDS,
    MOST_VALUES,
    Access,
    Beat,
    Failed,
    Leave,
    Message,
    Ready,
    Record,
    Records,
    Rows,
    WorkerMessages,
    encode_records,
    finished_record,
)
from rtservice.process.counters import LAGS, PHASES, CounterKey
from tests.support.unprintable import Unprintable

TCP = "tcp:127.0.0.1:1"


def decoder(*asked: tuple[int, int], access: bool = True) -> WorkerMessages:
    """Return the decoder for a worker of slot 1 with pending requests for rows, each an id and a number of rows."""
    made = WorkerMessages(slot=1, listeners=(TCP, "unix:/s"), access=access)
    for number, count in asked:
        made.ask(number, count)
    return made


def decoded(data: bytes, *asked: tuple[int, int], access: bool = True) -> list[Message]:
    made = decoder(*asked, access=access)
    made.feed(data)
    found = []
    while (message := made.next()) is not None:
        found.append(message)
    return found


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def record(
    level: Any = "info",
    namespace: Any = "its.own",
    when: Any = 1.5,
    text: Any = "it went",
    traceback: Any = "",
    fields: Any = None,
) -> bytes:
    return encode("records", [[level, namespace, when, text, traceback, {} if fields is None else fields]])


def decoded_record(event: dict[str, Any], text: str, traceback: str = "") -> Record:
    """Return the record that a worker sends, as decoded by the supervisor."""
    [message] = decoded(encode_records([finished_record(event, text, traceback)]))
    assert isinstance(message, Records)
    [only] = message.records
    return only


ROW = ["192.0.2.1:4711", TCP, "open", 1.5, None, 5, 27]
LINE = "start=1 peer=x worker=1\n"


# --- accepted messages ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode("ready"), Ready()),
        (encode("leave"), Leave()),
        (encode("failed", "no certificate\x1b"), Failed(r"no certificate\x1b")),
        (encode("beat", {}), Beat({})),
        (
            encode("beat", {"open": 1, "descriptor_limit": -1, f"closed\tidle\t{TCP}": 2, "protocol\trooms\t": 1.5}),
            Beat(
                {
                    CounterKey("open"): 1,
                    CounterKey("descriptor_limit"): -1,
                    CounterKey("closed", "idle", TCP): 2,
                    CounterKey("protocol", "rooms"): 1.5,
                }
            ),
        ),
        (encode("rows", {"id": 3, "rows": [ROW, ROW]}), Rows(3, [ROW, ROW])),
        (encode("access", [LINE]), Access([LINE])),
        (record(), Records([Record(LogLevel.info, "its.own", 1.5, "it went", "", {})], 2)),
        (encode("records", []), Records([], 1)),
        (
            record("critical", "a\x1b\n", 2, "\x1b[2Jtwo\nlines", "at\x00\n", {"a": [1, {"b": None}], "ü": "\x1b"}),
            Records(
                [
                    Record(
                        LogLevel.critical,
                        r"a\x1b\n",
                        2,
                        "\\x1b[2Jtwo\nlines",
                        "at\\x00\n",
                        {"a": [1, {"b": None}], "ü": "\x1b"},
                    )
                ],
                2,
            ),
        ),
    ],
)
def test_a_message_is_decoded(data, message) -> None:
    assert decoded(data, (3, 2)) == [message]


def test_messages_of_the_maximum_size_are_accepted() -> None:
    labels = {f"handshake_failed\tKIND_{number}\t{TCP}": number for number in range(51)}
    names = {f"protocol\tname_{number}\t": 1e300 for number in range(100)}
    lags = {f"lag\t{bucket}\t": 2**63 - 1 for bucket in range(len(LAGS) + 1)}
    phases = {f"phase\t{phase}\tunix:/s": 0 for phase in PHASES}
    counters = {**labels, **names, **lags, **phases}
    fields = {f"{number:0{LONGEST_NAME}}": "x" for number in range(MOST_FIELDS)}
    values = {"a": [0] * (MOST_VALUES - 1), "b": "x" * LONGEST_VALUE}
    messages = (
        encode("beat", dict(list(counters.items())[:MOST_COUNTERS])),
        encode("rows", {"id": 3, "rows": [ROW] * 500}),
        encode("access", ["start=" + "x" * 500 + " worker=1\n"] * MOST_LINES),
        record(
            namespace="x" * LONGEST_NAMESPACE, when=LATEST, text="x" * LONGEST_TEXT, traceback="x" * LONGEST_TRACEBACK
        ),
        record(fields=fields),
        record(fields=values),
        record(fields={"a": nested(DEEPEST), "b": 2**63 - 1, "c": -1e18}),
    )
    assert len(decoded(b"".join(messages), (3, 500))) == len(messages)


# --- violations ---

VIOLATIONS: dict[str, tuple[bytes, str]] = {
    "empty line": (b"\n", "an unknown message ''"),
    "unknown word": (b"no such word\n", "an unknown message 'no'"),
    "message of the supervisor": (encode("drain", []), "an unknown message 'drain'"),
    "message of earlier versions": (b"log {}\n", "an unknown message 'log'"),
    "not UTF-8": (b"beat \xff\n", "a message 'beat' that is not JSON"),
    "no value": (b"beat\n", "a message 'beat' that is not JSON"),
    "truncated": (b"beat {\n", "a message 'beat' that is not JSON"),
    "deep": (b"beat " + b"[" * 60_000 + b"\n", "a message 'beat' that is not JSON"),
    "nesting over the limit in a field": (record(fields={"a": nested(DEEPEST + 1)}), "field 'a' is too large"),
    "very deep nesting in a field": (record(fields={"a": nested(500)}), "field 'a' is too large"),
    "unterminated": (b"x" * 300_000, "a message of more than 262144 bytes"),
    "long": (b"beat " + b" " * 65_536 + b"\n", "a message 'beat' of more than 65536 bytes"),
    "too long for its word": (b"ready" + b" " * 80 + b"null\n", "a message 'ready' of more than 64 bytes"),
    "ready, with a value": (encode("ready", 1), "a message 'ready' with an invalid value"),
    "ready twice": (encode("ready") * 2, "'ready' after 'ready'"),
    "failed after ready": (encode("ready") + encode("failed", "x"), "'failed' after 'ready'"),
    "ready after failed": (encode("failed", "x") + encode("ready"), "'ready' after 'failed'"),
    "failed without a reason": (encode("failed", None), "a message 'failed' with an invalid value"),
    "failed with a long reason": (encode("failed", "x" * 5000), "a message 'failed' with an invalid value"),
    "leave, with a value": (encode("leave", "x"), "a message 'leave' with an invalid value"),
    # heartbeats
    "counters in a list": (encode("beat", [1]), "a heartbeat that is not an object"),
    "too many counters": (
        encode("beat", dict.fromkeys(map(str, range(MOST_COUNTERS + 1)), 1)),
        "is not an object of at most 200",
    ),
    "an unknown counter": (encode("beat", {"invented": 1}), "an unknown counter 'invented'"),
    "an empty name": (encode("beat", {"": 1}), "an unknown counter ''"),
    "a long name": (encode("beat", {"x" * 60_000: 1}), "an unknown counter 'x{40}'$"),
    "an unknown listener": (encode("beat", {"opened\t\ttcp:2": 1}), "an unknown counter"),
    "an empty label": (encode("beat", {f"closed\t\t{TCP}": 1}), "an unknown counter"),
    "a label with control characters": (encode("beat", {f"closed\t\x1b\t{TCP}": 1}), "an unknown counter"),
    "a long label": (encode("beat", {f"closed\t{'x' * 65}\t{TCP}": 1}), "an unknown counter"),
    "an unknown phase": (encode("beat", {f"phase\tflying\t{TCP}": 1}), "an unknown counter"),
    "a bucket out of range": (encode("beat", {f"lag\t{len(LAGS) + 1}\t": 1}), "an unknown counter"),
    "a negative bucket": (encode("beat", {"lag\t-1\t": 1}), "an unknown counter"),
    "an invalid Prometheus name": (encode("beat", {'protocol\ta"}\t': 1}), "an unknown counter"),
    "a key with unneeded tabs": (encode("beat", {"open\t\t": 1}), "an unknown counter"),
    "a key without its last tab": (encode("beat", {"protocol\ta": 1}), "an unknown counter"),
    "a protocol counter with a listener": (encode("beat", {f"protocol\ta\t{TCP}": 1}), "an unknown counter"),
    "too many labels": (
        encode("beat", {f"closed\t{n}\t{TCP}": 1 for n in range(52)}),
        "more than 51 labels of 'closed'",
    ),
    "too many names": (
        encode("beat", {f"protocol\ta{n}\t": 1 for n in range(101)}),
        "more than 100 labels of 'protocol'",
    ),
    "a text as a count": (encode("beat", {"open": "1"}), "an invalid count of 'open'"),
    "a bool as a count": (encode("beat", {"open": True}), "an invalid count of 'open'"),
    "null as a count": (encode("beat", {"open": None}), "an invalid count of 'open'"),
    "a fraction as a count": (encode("beat", {"open": 1.5}), "an invalid count of 'open'"),
    "a negative count": (encode("beat", {"ended": -1}), "an invalid count of 'ended'"),
    "a negative lag": (encode("beat", {"lag_us": -1}), "an invalid count of"),
    "a negative phase": (encode("beat", {f"phase\topen\t{TCP}": -1}), "an invalid count of"),
    "a negative gauge": (encode("beat", {"memory": -2}), "an invalid count of 'memory'"),
    "a large count": (encode("beat", {"ended": 2**63}), "an invalid count of 'ended'"),
    "a large float": (b'beat {"protocol\\ta\\t": 1e301}\n', "an invalid count of"),
    "an infinite float": (b'beat {"protocol\\ta\\t": 1e400}\n', "an invalid count of"),
    "NaN": (b'beat {"protocol\\ta\\t": NaN}\n', "a message 'beat' that is not JSON"),
    "Infinity": (b'beat {"open": Infinity}\n', "a message 'beat' that is not JSON"),
    "10**400": (b'beat {"open": 1' + b"0" * 400 + b"}\n", "a message 'beat' that is not JSON"),
    "10**60000": (b'beat {"open": 1' + b"0" * 60_000 + b"}\n", "a message 'beat' that is not JSON"),
    # rows
    "rows as null": (encode("rows", None), "an answer that is not an object"),
    "rows with an unknown key": (encode("rows", {"id": 3, "rows": [], "more": 1}), "an answer that is not an object"),
    "rows not requested": (encode("rows", {"id": 4, "rows": []}), "an answer without a question"),
    "rows with an id as text": (encode("rows", {"id": "3", "rows": []}), "an answer without a question"),
    "rows with an id as list": (encode("rows", {"id": [3], "rows": []}), "an answer without a question"),
    "answered twice": (encode("rows", {"id": 3, "rows": []}) * 2, "an answer without a question"),
    "too many rows": (encode("rows", {"id": 3, "rows": [ROW] * 3}), "not an array of rows, 2 at most"),
    "rows in an object": (encode("rows", {"id": 3, "rows": {}}), "not an array of rows, 2 at most"),
    "an empty row": (encode("rows", {"id": 3, "rows": [[]]}), "not an array of rows, 2 at most"),
    "a long row": (encode("rows", {"id": 3, "rows": [[*ROW, 1]]}), "not an array of rows, 2 at most"),
    "a row as text": (encode("rows", {"id": 3, "rows": ["1234567"]}), "not an array of rows, 2 at most"),
    **{
        f"a row with {value!a:.20} as {place}": (
            encode("rows", {"id": 3, "rows": [[*ROW[:place], value, *ROW[place + 1 :]]]}),
            "not an array of rows, 2 at most",
        )
        for place, value in [
            *((0, value) for value in ("x" * 65, "\x1b", "\ud800", None, 1, [])),
            *((1, value) for value in ("tcp:2", "", None, [])),
            *((2, value) for value in ("flying", None, [], {})),
            *((3, value) for value in ("1", None, 10**30, True, [])),
            *((4, value) for value in ("1", 10**30, False, [])),
            *((5, value) for value in (-1, 1.0, 2**63, "1", None)),
            *((6, value) for value in (-1, True, 2**63)),
        ]
    },
    # log records
    "a record of earlier versions": (
        encode("records", [{"log_format": "x"}]),
        "a log record that is not an array of six",
    ),
    "a short record": (encode("records", [["info"]]), "a log record that is not an array of six"),
    "a record outside an array": (
        encode("records", ["info", "a", 1, "", "", {}]),
        "a log record that is not an array of six",
    ),
    "records as null": (encode("records", None), "log records that are not an array of at most 100"),
    "too many records": (encode("records", [["info", "a", 1, "", "", {}]] * 101), "log records that are not an array"),
    "an unknown level": (record("loud"), "a log record of an unknown level 'loud'"),
    "a level as nested lists": (record(nested(500)), "a log record of an unknown level of type list"),
    "a level as null": (record(None), "a log record of an unknown level of type NoneType"),
    "a long namespace": (record(namespace="x" * 201), "a log record with an invalid namespace"),
    "no namespace": (record(namespace=None), "a log record with an invalid namespace"),
    "before 1970": (record(when=-1), "a log record with an invalid time"),
    "after 9999": (record(when=LATEST + 1), "a log record with an invalid time"),
    "a huge time": (record(when=10**300), "a log record with an invalid time"),
    "an infinite time": (b'records [["info", "a", 1e999, "", "", {}]]\n', "a log record with an invalid time"),
    "a time as text": (record(when="1"), "a log record with an invalid time"),
    "a time as bool": (record(when=True), "a log record with an invalid time"),
    "a long text": (record(text="x" * (LONGEST_TEXT + 1)), "whose text is too long"),
    "no text": (record(text=None), "whose text is not a string"),
    "a long traceback": (record(traceback="x" * (LONGEST_TRACEBACK + 1)), "whose text is too long"),
    "fields in a list": (record(fields=[]), "whose fields are not an object"),
    "too many fields": (
        record(fields={f"a{n}": 1 for n in range(MOST_FIELDS + 1)}),
        "whose fields are not an object of at most 64",
    ),
    "many values": (record(fields={"a": [0] * MOST_VALUES}), "field 'a' is too large"),
    "too many values in all fields": (record(fields={"a": [0] * 300, "b": [0] * 300}), "field 'b' is too large"),
    "too many keys in a field": (
        record(fields={"a": {str(n): 0 for n in range(MOST_VALUES)}}),
        "field 'a' is too large",
    ),
    "a long value": (record(fields={"a": "x" * (LONGEST_VALUE + 1)}), "field 'a' is too long"),
    "a long value inside": (record(fields={"a": ["x" * (LONGEST_VALUE + 1)]}), "field 'a' is too large"),
    "a lone surrogate": (record(fields={"a": "\ud800"}), "field 'a' is too long, or not valid text"),
    "a lone surrogate inside": (record(fields={"a": ["\ud800"]}), "field 'a' is too large"),
    "a huge number": (record(fields={"a": 2**63}), "field 'a' is too large"),
    "a huge float": (b'records [["info", "a", 1, "", "", {"a": -1e999}]]\n', "field 'a' is too large"),
    "an empty field": (record(fields={"": 1}), "a log record with a field ''"),
    "a long field": (record(fields={"x" * 65: 1}), "a log record with a field 'x{20}'$"),
    "a field name with control characters": (record(fields={"\x1b": 1}), r"a log record with a field '\\x1b'"),
    "a field name of Twisted": (
        record(fields={"log_format": "{a:>2000000000}"}),
        "a log record with a field 'log_format'",
    ),
    "a reserved name inside a field": (record(fields={"a": {"log_level": 1}}), "field 'a' is too large"),
    "a legacy field name": (record(fields={"format": "%(a)2000000000d"}), "a log record with a field 'format'"),
    "failure fields": (record(fields={"isError": 1, "failure": "x"}), "a log record with a field 'isError'"),
    "a slot field": (record(fields={"slot": 7}), "a log record with a field 'slot'"),
    # access log lines
    "a line outside an array": (encode("access", LINE), "not an array of at most 100"),
    "too many lines": (encode("access", [LINE] * 101), "not an array of at most 100"),
    "a long line": (
        encode("access", [f"start={'x' * 5000} worker=1\n"]),
        "an invalid line for the access log",
    ),
    "two lines in one": (
        encode("access", ["start=1 worker=0\nstart=1 worker=1\n"]),
        "an invalid line for the access log",
    ),
    "a line of another worker": (encode("access", ["start=1 worker=0\n"]), "an invalid line for the access log"),
    "a line with control characters": (
        encode("access", ["start=\x1b worker=1\n"]),
        "an invalid line for the access log",
    ),
    "a line without a start time": (encode("access", ["hello worker=1\n"]), "an invalid line for the access log"),
    "a line as null": (encode("access", [None]), "an invalid line for the access log"),
    "an empty access log line": (encode("access", [""]), "an invalid line for the access log"),
}


@pytest.mark.parametrize(("data", "problem"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_invalid_message_is_a_violation_with_a_short_printable_text(data, problem) -> None:
    with pytest.raises(ProtocolViolation, match=problem) as error:
        decoded(data, (3, 2))
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()
    assert str(error.value).isascii()


def test_access_log_lines_without_an_access_log_are_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="an access log that does not exist"):
        decoded(encode("access", [LINE]), access=False)


def test_number_of_labels_is_bounded_over_all_heartbeats() -> None:
    made = decoder()
    for number in range(51):
        made.feed(encode("beat", {f"refused\t{number}\t{TCP}": 1, f"refused\t{number}\tunix:/s": 1}))
        assert made.next()
    made.feed(encode("beat", {f"refused\t50\t{TCP}": 2}))
    assert made.next()
    made.feed(encode("beat", {f"refused\t51\t{TCP}": 1}))
    with pytest.raises(ProtocolViolation, match="more than 51 labels"):
        made.next()


def test_unrequested_answer_is_rejected_without_decoding() -> None:
    with pytest.raises(ProtocolViolation, match="an answer without a question"):
        decoded(b"rows this would not be JSON\n")


# --- random input ---


def mutated(data: bytes, source: random.Random) -> bytes:
    """Return the data with some bytes changed, removed, repeated or inserted."""
    pieces = [
        *(b"\n", b"\x00", b"\xff", b"[", b"]", b"{", b"}", b'"', b",", b":", b"-", b"\\u0000", b"\\ud800", b"NaN"),
        *(b"1e999", b"9" * 400, b"null", b"true", b"log_format", b"{a:>2000000000}", b"\\t", b" ", b"[" * 2000),
    ]
    for _ in range(source.randrange(1, 6)):
        at, more = source.randrange(len(data) + 1), source.randrange(20)
        data = source.choice(
            (
                data[:at] + data[at + more :],
                data[:at] + data[at : at + more] * source.randrange(2, 30) + data[at + more :],
                data[:at] + source.choice(pieces) + data[at + source.randrange(3) :],
                data[:at] + source.randbytes(more) + data[at + more :],
            )
        )
    return data


VALID = [
    encode("ready"),
    encode("failed", "why"),
    encode("leave"),
    encode("beat", {"open": 1, f"closed\tidle\t{TCP}": 2, "protocol\trooms\t": 1.5, "lag\t3\t": 4}),
    encode("rows", {"id": 3, "rows": [ROW, ROW]}),
    encode("access", [LINE, LINE]),
    record(fields={"peer": "x", "n": 1, "deep": [1, {"a": [None, True, "ü"]}]}),
    record("error", text="\x1b[31m", traceback="Traceback\n  at\n"),
]


def check_message(message: Message) -> None:
    """Check that a decoded message is within its bounds."""
    assert message.cost >= 1
    text = json.dumps(message.__dict__ if hasattr(message, "__dict__") else repr(message))
    assert len(text) < 2_000_000
    for log_record in message.records if isinstance(message, Records) else ():
        assert log_record.text.replace("\n", "").replace("\t", "").isprintable()
        assert log_record.namespace.replace("\t", "").isprintable()
        assert not log_record.fields.keys() & worker_messages.RESERVED
        assert not any(name.startswith("log_") for name in log_record.fields)
        json.dumps(log_record.fields, allow_nan=False).encode()


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_yield_only_valid_messages_or_a_violation(seed) -> None:
    source = random.Random(seed)
    violations: list[str] = []
    messages = 0
    slowest = 0.0
    for _ in range(4000):
        data = b"".join(source.choices(VALID, k=source.randrange(1, 4)))
        data = mutated(data, source) if source.random() < 0.9 else source.randbytes(source.randrange(200))
        made = decoder((3, 2))
        began = time.thread_time()
        try:
            at = 0
            while at < len(data):
                size = source.choice((1, 10, 100, 8192))
                made.feed(data[at : at + size])
                at += size
                while (message := made.next()) is not None:
                    messages += 1
                    check_message(message)
        except ProtocolViolation as problem:
            violations.append(str(problem))
        slowest = max(slowest, time.thread_time() - began)
    assert all(len(problem) < 200 and problem.isprintable() for problem in violations)
    assert len(violations) > 1000
    assert messages > 1000
    assert slowest < 1


HEAVY = {
    "lists": b"records [" + b"[]," * 43_000 + b"1]\n",
    "objects": b"records [" + b"{}," * 43_000 + b"1]\n",
    "numbers": b"records [" + b"1," * 65_000 + b"1]\n",
    "long numbers": b"records [" + (b"9" * 300 + b",") * 420 + b"1]\n",
    "floats": b"records [0." + b"7" * 130_000 + b"]\n",
    "exponents": b"records [" + b"1.5e300," * 16_000 + b"1]\n",
    "names": b"beat {" + b",".join(b'"%x":1' % number for number in range(7000)) + b"}\n",
    "controls": record(text="\x01" * LONGEST_TEXT, traceback=""),
    "control and other characters": record(text="\x01é\u202e" * 5000),
    "line ends": record(text="\n" * LONGEST_TEXT, traceback="\n" * LONGEST_TRACEBACK),
    "unknown words": b"".join(b"x%d \n" % number for number in range(1000)),
    "heartbeats": encode("beat", {}) * 1000,
}


@pytest.mark.parametrize("data", HEAVY.values(), ids=HEAVY)
def test_most_expensive_messages_take_bounded_time_and_memory(data) -> None:
    tracemalloc.start()
    try:
        began = time.thread_time()
        with contextlib.suppress(ProtocolViolation):
            decoded(data)
        took = time.thread_time() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < 1  # under tracemalloc; some 10 ms without
    assert peak < 16 << 20


def test_message_cost_grows_with_the_work_for_the_supervisor() -> None:
    def cost(data: bytes) -> int:
        [message] = decoded(data, (3, 500))
        return message.cost

    assert cost(encode("beat", {})) == cost(encode("ready")) == 1
    assert cost(record()) == 2
    assert cost(encode("records", [["info", "a", 1, "", "", {}]] * 100)) == 101
    assert cost(encode("access", [LINE] * 100)) == 6
    assert cost(encode("rows", {"id": 3, "rows": [ROW] * 500})) == 51
    assert cost(record(text="x" * 10_000)) == 11
    assert cost(record(text="\x01" * 10_000)) > 400
    assert cost(record(traceback="\n" * 10_000)) > 300


# --- records encoded by the worker ---


def self_referencing() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


class IncomparableInt(int):
    def __lt__(self, other: object) -> bool:
        raise RuntimeError("no")


VALUES: dict[str, Any] = {
    "long": "x" * 1_000_000,
    "four-byte characters": "\U0001f600" * 100_000,
    "surrogates": "\ud800" * 5000,
    "bytes": b"\xff\x00" * 5000,
    "an object": object(),
    "a set": {1, 2},
    "NaN": float("nan"),
    "infinity": float("-inf"),
    "10**400": 10**400,
    "10**10000": 10**10_000,
    "an int subclass": IncomparableInt(5),
    "unprintable": Unprintable(),
    "self-referencing": self_referencing(),
    "deep": nested(900),
    "wide": [[0] * 300] * 300,
    "wide and deep": [[[[[0] * 300] * 300] * 300] * 300],
    "keys that are not strings": {1: 2, None: 3, ("a",): 4},
    "long keys": {"x" * 1000: 1},
    "keys of Twisted": {"log_format": "x"},
    "many": list(range(MOST_VALUES + 10)),
    "a class": Unprintable,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["value", "format", "isError", "log_system", "x" * 100, "a b", "slot", "\x1b"])
def test_record_with_any_field_of_hosted_code_is_accepted(name, value) -> None:
    event = {"log_level": LogLevel.warn, "log_namespace": "a", "log_time": 5.0, name: value, "more": 1}
    message = decoded_record(event, "text", "")
    assert (message.level, message.namespace, message.time, message.text) == (LogLevel.warn, "a", 5.0, "text")
    assert message.fields["more"] == 1


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", ["log_level", "log_namespace", "log_time", "log_format"])
def test_record_with_any_value_in_the_fields_of_twisted_is_accepted(name, value) -> None:
    event = {"log_level": LogLevel.warn, "log_namespace": "a", "log_time": 5.0, name: value}
    message = decoded_record(event, "text", "trace")
    assert (message.text, message.traceback) == ("text", "trace")


def test_record_with_many_fields_or_long_text_is_shortened_and_accepted() -> None:
    base = {"log_level": LogLevel.warn, "log_namespace": "a" * 1000, "log_time": 5.0}
    for event in (
        base | {f"f{number}": "\U0001f600" * 5000 for number in range(1000)},
        base | {f"f{number}": [0] * 400 for number in range(1000)},
        base,
    ):
        for char in ("x", "\U0001f600", "\x00", "\ud800"):
            message = decoded_record(event, char * 200_000, char * 200_000)
            assert "characters left out" in message.text
            assert "characters left out" in message.traceback


def test_records_too_long_for_one_message_are_sent_in_several() -> None:
    event = {"log_level": LogLevel.info, "log_namespace": "a", "log_time": 5.0, "value": "x" * 3000}
    for text in ("short", "x" * LONGEST_TEXT, "\U0001f600" * LONGEST_TEXT):
        records = [finished_record(event, text) for _ in range(MOST_RECORDS)]
        messages = decoded(encode_records(records))
        assert len(messages) > 1
        assert sum(len(message.records) for message in messages if isinstance(message, Records)) == MOST_RECORDS


def test_plain_fields_arrive_unchanged_except_the_one_that_is_the_text() -> None:
    event = {
        **{"log_level": LogLevel.info, "log_namespace": "a", "log_time": 5.0, "log_format": "{record}"},
        **{
            "record": "the text",
            "peer": "ü",
            "n": 1,
            "f": 1.5,
            "b": True,
            "none": None,
            "list": (1, ["a"]),
            "raw": b"\xff",
        },
    }
    message = decoded_record(event, "the text")
    assert message.fields == {
        **{"peer": "ü", "n": 1, "f": 1.5, "b": True, "none": None, "list": [1, ["a"]], "raw": r"\xff"},
    }


def test_event_of_a_worker_arrives_with_its_name_and_fields() -> None:
    records: list[Any] = []
    DRAIN_DONE.log(Logger("rtservice", observer=records.append), ended=1, aborted=2, seconds=0.5)
    arrived = as_event(decoded_record(records[0], "the text"), 3)
    assert {name: value for name, value in arrived.items() if name[:4] != "log_"} == {
        **{"event": "drain.done", "slot": 3, "ended": 1, "aborted": 2, "seconds": 0.5},
    }


def test_fields_that_legacy_observers_interpret_are_renamed_or_dropped() -> None:
    event = {"log_level": LogLevel.info, "log_namespace": "a", "log_time": 5.0, "message": "hi", "format": "%s"}
    message = decoded_record(event, "hi")
    assert message.fields == {"message_": "hi", "format_": "%s"}
    message = decoded_record(event | {"isError": 0, "system": "-", "own": 1}, "hi")
    assert message.fields == {"own": 1}


def test_every_message_of_a_worker_has_a_length_limit() -> None:
    assert LONGEST_FROM_WORKER.keys() == decoder()._decoders.keys()
