"""etc/Containerfile: its instructions, and a container of the image that they build."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rtservice.testing import Service
from tests.support.clients import echoes, is_greeted
from tests.support.container import Builder, Stage, builder, stages_of
from tests.support.deadline import DEADLINE
from tests.support.network import network_of
from tests.support.processes import children
from tests.support.repository import ETC, ROOT

STAGES = stages_of((ETC / "Containerfile").read_text())
BUILD, FINAL = STAGES


# --- instructions ---


def test_both_stages_have_the_same_base_image_of_a_fixed_python_version() -> None:
    assert BUILD.base == FINAL.base
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim", FINAL.base)


def test_the_image_declares_a_user_that_is_not_root_and_the_signal_of_a_graceful_shutdown() -> None:
    user, group = map(int, FINAL.last("USER").split(":"))
    assert user > 0 < group
    assert FINAL.last("STOPSIGNAL") == "SIGTERM"


def test_the_command_is_a_list_so_that_twistd_is_process_1() -> None:
    assert FINAL.command()[0] == "/opt/rtservice/bin/twistd"
    assert "--nodaemon" in FINAL.command()
    assert "--pidfile=" in FINAL.command()


def test_the_extras_of_the_image_exist() -> None:
    (extras,) = re.findall(r"\[([a-z,]+)\]", " ".join(text for kind, text in BUILD.instructions if kind == "RUN"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_files_that_are_copied_exist_and_are_not_ignored() -> None:
    copied = [word for kind, text in BUILD.instructions if kind == "COPY" for word in text.split()[:-1]]
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {pattern for pattern in patterns if pattern.startswith("!")}
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_a_line_that_is_no_instruction_is_an_error() -> None:
    with pytest.raises(ValueError, match="no instruction: 'rm file'"):
        stages_of("FROM a\nrm file\n")


# --- a container ---


class Container:
    """A running container; `pid` is the number of its process 1 on this machine."""

    def __init__(self, image: Builder, stage: Stage, directory: Path) -> None:
        command = [*image.run_command(stage), *stage.command()]
        self.service = Service(command, directory, dict(os.environ))
        try:
            self.service.wait_event("listener.listening")
        except AssertionError:
            self.kill()
            raise
        self.pid = children(self.service.process.pid)[0]

    def kill(self) -> None:
        """Kill it if it is running.

        The end of unshare(1) does not do this, not even with `--kill-child`: a change of the user clears the signal
        that it sets (prctl(2), PR_SET_PDEATHSIG).
        """
        for pid in children(self.service.process.pid) if self.service.process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        self.service.kill()

    def connect(self) -> socket.socket:
        with network_of(self.pid):
            return socket.create_connection(("127.0.0.1", 8080), DEADLINE)

    def status(self, path: str) -> int:
        """Return the HTTP status of a path of the status server."""
        with network_of(self.pid):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:9090{path}", timeout=DEADLINE) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code

    def enter(self, *command: str) -> str:
        """Run a command as root in the namespaces of the container, and return its output."""
        entering = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wd=/", *command]
        return subprocess.run(entering, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout

    def field(self, name: str) -> str:
        """Return a field of the status of process 1: proc(5)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return dict(line.split(":", 1) for line in lines)[name].strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    for program, package in (("ip", "iproute2"), ("setpriv", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} (Debian: {package}) is not installed")
    with contextlib.ExitStack() as stack:
        try:
            building = stack.enter_context(builder(ROOT, tmp_path_factory.mktemp("image")))
        except OSError as error:
            pytest.skip(str(error))
        building.build(STAGES)
        yield building


@pytest.fixture
def container(image: Builder, tmp_path: Path) -> Iterator[Container]:
    running = Container(image, FINAL, tmp_path)
    yield running
    running.kill()


def test_a_container_serves_as_process_1_without_privileges(container) -> None:
    with container.connect() as client:
        assert is_greeted(client)
        assert echoes(client)
    assert container.field("NSpid").split()[-1] == "1"
    assert container.field("Uid").split() == [FINAL.last("USER").split(":")[0]] * 4
    assert {container.field(name) for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert [container.status(path) for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3


def test_a_container_writes_nothing_to_its_root_and_its_log_as_json(container) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        container.enter("touch", "/opt/rtservice/file")
    assert [line for line in container.service.lines if not line.startswith("{")] == []
    assert json.loads(container.service.lines[0])["time"]


def test_sigterm_drains_a_container(container) -> None:
    with container.connect() as client:
        assert is_greeted(client)
        os.kill(container.pid, signal.SIGTERM)
        container.service.wait_event("drain.started")
        assert container.status("/readyz") == 503
        assert echoes(client)
    assert container.service.process.wait(DEADLINE) == 0
    done = container.service.wait_event("drain.done")
    assert (done["ended"], done["aborted"]) == (1, 0)


def test_process_1_of_a_container_reaps_orphans(container, wait_for: Callable) -> None:
    # The shell exits before its child, which process 1 inherits.
    container.enter("sh", "-c", "sleep 0.1 & exit")
    wait_for(lambda: children(container.pid) == [])
    assert container.service.process.poll() is None
