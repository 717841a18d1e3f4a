"""The choice of the reactor, and its timers while the system clock is changed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.deadline import DEADLINE
from tests.support.programs import PROGRAMS, program


def reactor_of(service) -> str:
    return json.loads(service.wait_line("reactor class: "))["reactor"]


@pytest.mark.skipif(sys.platform != "linux", reason="the reactor needs epoll(7)")
def test_the_default_reactor_is_that_of_rtservice(service) -> None:
    assert reactor_of(service("--port=0")) == "rtservice.net.reactor.Reactor"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("poll", "twisted.internet.pollreactor.PollReactor"),
        ("asyncio", "twisted.internet.asyncioreactor.AsyncioSelectorReactor"),
        ("rtservice", "rtservice.net.reactor.Reactor"),
    ],
)
def test_a_chosen_reactor_is_used_and_serves(service, read_all, name, expected) -> None:
    running = service("--port=0", twistd=(f"--reactor={name}",))
    assert reactor_of(running) == expected
    with running.connect() as client:
        client.sendall(b"x" * 1_000_000)
        client.shutdown(1)
        assert read_all(client) == b"Hello from the server!" + b"x" * 1_000_000


def test_any_twisted_program_can_use_the_reactor(tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "twistd"),
        "-n",
        "--pidfile=",
        "--reactor=rtservice",
        "-y",
        str(PROGRAMS / "any_twisted_program.py"),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE)
    assert result.returncode == 0, result.stderr
    assert "runs on rtservice.net.reactor" in result.stdout


def test_without_epoll_the_poll_reactor_is_used_with_one_warning(service, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import select\ndel select.epoll, select.EPOLLIN\n")
    running = service("--port=0", PYTHONPATH=str(tmp_path))
    running.wait_event("listener.listening", 2)
    warnings = [event for event in running.events if event["event"] == "start.reactor_unavailable"]
    assert len(warnings) == 1
    assert warnings[0]["level"] == "warn"
    assert reactor_of(running) == "twisted.internet.pollreactor.PollReactor"


@pytest.mark.parametrize("offset", ["-3600", "+3600"])
def test_setting_the_clock_by_an_hour_does_not_move_timers(tmp_path, environment, offset) -> None:
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.skip("faketime (Debian: faketime) is not installed")
    library = subprocess.run(
        [faketime, "-f", "+0", "sh", "-c", "echo $LD_PRELOAD"], capture_output=True, text=True, timeout=DEADLINE
    ).stdout.strip()
    clock = tmp_path / "clock"
    clock.write_text("+0")
    fake = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    result = subprocess.run(
        program("set_clock", str(clock), offset),
        env={**environment, **fake},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    walls = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("wall")]
    assert abs(walls[1] - walls[0]) > 3000, result.stdout + result.stderr  # the clock was changed
    (took,) = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("fired")]
    assert 1 <= took < DEADLINE
