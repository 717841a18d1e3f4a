"""The outcome of a start is reported in one line, whatever is raised."""

import sys

import pytest

from rtservice.startup.start import StartReporter


@pytest.fixture
def hooks(monkeypatch) -> list[str]:
    """What the excepthooks of Python and of hosted code were called for; puts the hook of before back."""
    called: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: called.append(f"python: {error}"))
    return called


def raised(text: str) -> None:
    error = LookupError(text)
    sys.excepthook(type(error), error, None)


def test_the_excepthook_of_before_is_back_once_a_start_is_over(hooks) -> None:
    before = sys.excepthook
    start = StartReporter({})
    start.watch()
    assert sys.excepthook is not before
    start.report(None)
    assert sys.excepthook is before


def test_an_excepthook_that_hosted_code_installs_stays_and_a_start_that_is_over_is_not_reported(hooks, capfd) -> None:
    start = StartReporter({})
    start.watch()
    ours = sys.excepthook

    def theirs(kind, error, traceback):
        hooks.append(f"theirs: {error}")
        ours(kind, error, traceback)

    sys.excepthook = theirs
    start.report(None)
    assert sys.excepthook is theirs
    raised("late")
    assert hooks == ["theirs: late", "python: late"]
    assert capfd.readouterr().err == ""


def test_what_is_raised_in_a_start_is_reported_through_an_excepthook_of_hosted_code(hooks, capfd) -> None:
    start = StartReporter({})
    start.watch()
    ours = sys.excepthook
    sys.excepthook = lambda kind, error, traceback: ours(kind, error, traceback)
    raised("early")
    assert capfd.readouterr().err == "rtservice: cannot start: LookupError: early\n"
    assert hooks == []
