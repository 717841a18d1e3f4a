"""The outcome of a start is reported in one line."""

import sys

import pytest

from rtservice.startup.start import StartReporter


@pytest.fixture
def hooks(monkeypatch) -> list[str]:
    """Record the calls of the excepthooks of Python and of hosted code; restore the previous hook."""
    called: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: called.append(f"python: {error}"))
    return called


def call_excepthook(text: str) -> None:
    error = LookupError(text)
    sys.excepthook(type(error), error, None)


def test_previous_excepthook_is_restored_after_the_start(hooks) -> None:
    before = sys.excepthook
    start = StartReporter({})
    start.watch()
    assert sys.excepthook is not before
    start.report(None)
    assert sys.excepthook is before


def test_excepthook_of_hosted_code_stays_installed_after_the_start(hooks, capfd) -> None:
    start = StartReporter({})
    start.watch()
    reporter_hook = sys.excepthook

    def hosted_hook(kind, error, traceback):
        hooks.append(f"theirs: {error}")
        reporter_hook(kind, error, traceback)

    sys.excepthook = hosted_hook
    start.report(None)
    assert sys.excepthook is hosted_hook
    call_excepthook("late")
    assert hooks == ["theirs: late", "python: late"]
    assert capfd.readouterr().err == ""


def test_start_error_is_reported_through_an_excepthook_of_hosted_code(hooks, capfd) -> None:
    start = StartReporter({})
    start.watch()
    reporter_hook = sys.excepthook
    sys.excepthook = lambda kind, error, traceback: reporter_hook(kind, error, traceback)
    call_excepthook("early")
    assert capfd.readouterr().err == "rtservice: cannot start: LookupError: early\n"
    assert hooks == []
