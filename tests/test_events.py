"""Every log record of rtservice is a declared event with exactly its declared fields."""

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.logger import Logger, LogLevel, formatEvent

import rtservice
from rtservice import events
from rtservice.events import AREAS, EVENTS, FIELDS, Event, LimitedEvent
from tests.support.checked_events import problems

PACKAGE = Path(rtservice.__file__).parent
CONSTANTS = {name: event for name, event in vars(events).items() if isinstance(event, Event)}

# Methods of a Logger that log.
LOGGING = {"debug", "info", "warn", "error", "critical", "failure", "emit", "failuresHandled", "failureHandler"}

# Calls of these methods that log no declared event.
EXCEPTIONS = {
    ("events.py", "logger.emit"),  # where events are logged
    ("events.py", "logger.failure"),
    ("interfaces.py", "super().emit"),  # a logger of hosted protocols
}

# Fields that are passed as `**worker.identity`.
IDENTITIES = {"identity": {"worker", "slot", "pid"}}


def calls() -> Iterator[tuple[str, ast.Call, ast.Attribute]]:
    """Yield each method call in the package, with the name of its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield name, node, node.func


def test_the_package_logs_only_events() -> None:
    others = set()
    for file, _, method in calls():
        if method.attr in LOGGING and ast.unparse(method.value) not in CONSTANTS:
            others.add((file, ast.unparse(method)))
    assert others == EXCEPTIONS


def test_logging_methods_are_only_called_directly() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("info", "warn", "critical") and id(node) not in called:
                assert ast.unparse(node.value) == "LogLevel", f"{path}:{node.lineno}"


def test_each_event_is_logged_with_exactly_its_fields() -> None:
    logged = 0
    for file, call, method in calls():
        event = CONSTANTS.get(ast.unparse(method.value))
        if event is None or method.attr not in ("log", "failure"):
            continue
        given = {keyword.arg for keyword in call.keywords if keyword.arg}
        for keyword in call.keywords:
            if keyword.arg is None:
                given |= IDENTITIES[ast.unparse(keyword.value).rpartition(".")[2]]
        given -= {"level"} if method.attr == "failure" else set()
        assert given == set(event.fields), f"{file}:{call.lineno}: {event.name}"
        logged += 1
    assert logged > 80


def test_each_event_is_logged_somewhere() -> None:
    used = {ast.unparse(method.value) for _, _, method in calls() if method.attr in ("log", "failure")}
    assert CONSTANTS.keys() - used == set()


def test_event_names_are_unique_dotted_and_lower_case() -> None:
    assert len(EVENTS) == len(CONSTANTS)
    for name, event in EVENTS.items():
        assert name == event.name
        assert re.fullmatch(r"[a-z]+(\.[a-z]+(_[a-z]+)*)", name), name


def test_the_glossary_has_exactly_the_fields_of_the_events() -> None:
    assert {field for event in EVENTS.values() for field in event.fields} == FIELDS.keys()


def test_the_text_of_an_event_uses_only_its_fields() -> None:
    for event in EVENTS.values():
        named = {name.partition("!")[0] for _, name, _, _ in string.Formatter().parse(event.text) if name}
        assert named <= set(event.fields), event.name


def test_each_event_is_in_one_area() -> None:
    words = [word for area in AREAS.values() for word in area]
    assert len(words) == len(set(words))
    assert {name.partition(".")[0] for name in EVENTS} == set(words)


def test_the_meaning_of_an_event_is_a_sentence() -> None:
    for event in EVENTS.values():
        assert event.meaning[0].isupper() or event.meaning[0] == "`", event.name
        assert event.meaning.endswith("."), event.name


@pytest.fixture
def logged() -> tuple[Logger, list[dict]]:
    """A logger, and the records that it logs."""
    records: list[dict] = []
    return Logger("a", observer=records.append), records


def test_a_record_has_the_name_of_the_event_and_its_fields(logged) -> None:
    logger, records = logged
    event = Event("a.b", LogLevel.warn, "it is {count}", fields=("count",), meaning="A test.")
    event.log(logger, count=3)
    [record] = records
    assert (record["event"], record["count"], record["log_level"]) == ("a.b", 3, LogLevel.warn)
    assert formatEvent(record) == "it is 3"


@pytest.mark.parametrize(("given", "level"), [({}, LogLevel.critical), ({"level": LogLevel.debug}, LogLevel.debug)])
def test_a_failure_record_has_the_handled_exception(logged, given, level) -> None:
    logger, records = logged
    event = Event("a.b", LogLevel.critical, "failed", meaning="A test.")
    try:
        raise ValueError("no")
    except ValueError:
        event.failure(logger, **given)
    [record] = records
    assert (record["event"], record["log_level"]) == ("a.b", level)
    assert record["log_failure"].check(ValueError)


@pytest.mark.parametrize(("suppressed", "text"), [(0, "x"), (4, "x (4 more since the last such record)")])
def test_a_limited_event_counts_the_suppressed_records(logged, suppressed, text) -> None:
    logger, records = logged
    event = LimitedEvent("a.b", LogLevel.warn, "{problem}", fields=("problem",), meaning="A test.")
    event.log(logger, problem="x", suppressed=suppressed)
    [record] = records
    assert (formatEvent(record), record["suppressed"]) == (text, suppressed)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"seconds": 1, "stack": "x"}, []),
        ({"seconds": 1.5, "stack": "x"}, []),
        ({"seconds": True, "stack": "x"}, ["reactor.blocked: seconds is True"]),
        ({"seconds": 1, "stack": None}, ["reactor.blocked: stack is None"]),
        ({"seconds": 1}, ["reactor.blocked has the fields ['seconds'] instead of ['seconds', 'stack']"]),
    ],
)
def test_records_in_tests_are_checked(fields, wrong) -> None:
    assert problems(events.REACTOR_BLOCKED, fields) == wrong
