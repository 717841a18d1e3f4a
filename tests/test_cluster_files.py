"""HAProxy and rtservice accept the files in etc/cluster, whose numbers match each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib

import pytest

from tests.support.needs import needs
from tests.support.repository import ETC, PACKAGE

DIRECTORY = ETC / "cluster"
HAPROXY_CFG = (DIRECTORY / "haproxy.cfg").read_text()
NODE = tomllib.loads((DIRECTORY / "rtservice.toml").read_text())

# Debian installs it in /usr/sbin, which is not in the PATH of users.
HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "": 1}


def durations(name: str, text: str = HAPROXY_CFG) -> set[float]:
    """Return the values of a setting in seconds."""
    found = re.findall(rf"^[^#\n]*\b{name}[ =](\d+)([a-z]*)\b", text, re.MULTILINE)
    assert found, name
    return {int(number) * SECONDS[unit] for number, unit in found}


@pytest.mark.skipif(HAPROXY is None, reason="haproxy (Debian: haproxy) is not installed")
def test_haproxy_accepts_its_configuration_without_warnings() -> None:
    command = [str(HAPROXY), "-c", "-f", str(DIRECTORY / "haproxy.cfg")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_rtservice_accepts_the_settings_of_a_node(run) -> None:
    checked = run("--nodaemon", "rtservice", "--config", str(DIRECTORY / "rtservice.toml"), "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_haproxy_connects_to_the_ports_of_the_nodes() -> None:
    ports = re.findall(r"presetenv NODE\d \S+:(\d+)", HAPROXY_CFG)
    assert [f"proxy:tcp:{port}" for port in ports] == NODE["listen"] * 2
    assert re.findall(r"presetenv STATUS_PORT (\d+)", HAPROXY_CFG) == [NODE["status"].removeprefix("*:")]


def test_the_limit_of_haproxy_is_reached_before_that_of_a_node() -> None:
    limits = {int(limit) for limit in re.findall(r"\bmaxconn (\d+)", HAPROXY_CFG)}
    assert len(limits) == 1
    assert max(limits) < NODE["max-connections"]


def test_nodes_close_idle_connections_before_haproxy() -> None:
    idle = set[float]().union(*(durations(f"timeout {name}") for name in ("client", "server", "tunnel")))
    # The frontend of the metrics has a shorter one.
    assert min(idle - {10}) > NODE["idle-timeout"]


def test_haproxy_finds_a_drain_before_it_ends() -> None:
    (interval,), (fast,) = durations("inter"), durations("fastinter")
    assert interval + fast < NODE["drain-timeout"] / 10


def test_systemd_waits_for_the_connections_of_haproxy() -> None:
    text = (DIRECTORY / "haproxy.service.d/graceful.conf").read_text()
    (timeout,), (stop,) = durations("TimeoutStopSec", text), durations("hard-stop-after")
    assert timeout > stop


@needs("systemd-analyze", "systemd")
def test_systemd_accepts_the_drop_in_of_a_node(tmp_path) -> None:
    unit = "rtservice-standalone.service"
    text = (ETC / unit).read_text()
    # The installed program does not exist on this machine.
    (tmp_path / unit).write_text(text.replace("/opt/rtservice/bin/twistd", shutil.which("true") or "/bin/true"))
    shutil.copytree(DIRECTORY / f"{unit}.d", tmp_path / f"{unit}.d")
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    # systemd may also warn about units of this machine.
    assert [line for line in checked.stderr.splitlines() if "rtservice" in line] == []
    (timeout,) = durations("TimeoutStopSec", (DIRECTORY / f"{unit}.d/cluster.conf").read_text())
    assert timeout == NODE["drain-timeout"] + 15


def test_redis_permits_the_commands_of_the_hub() -> None:
    (user,) = re.findall(r"^user rtservice (.*)$", (DIRECTORY / "redis.conf").read_text(), re.MULTILINE)
    permitted = set(re.findall(r"\+([a-z|]+)", user))
    source = (PACKAGE / "hub/redis_scripts.py").read_text()
    used = {command.lower() for command in re.findall(r"redis\.call\('(\w+)'", source)}
    assert len(used) > 10
    assert used <= permitted
