"""What is left of root once --uid, --gid and --euid have been followed."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
DEADLINE = 30
NOBODY = "65534"

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user")


def credentials(pid: int) -> dict[str, set[str]]:
    """The user, group and capability fields of proc_pid_status(5), each as a set of its values."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: set(fields[name].split()) for name in ("Uid", "Gid", "Groups", "CapPrm", "CapEff")}


def assert_refused(result, *words: str) -> None:
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("daemon", [False, True], ids=["fore", "daemon"])
@pytest.mark.parametrize("more", [[], ["--workers=2"], ["--check"]], ids=["one", "workers", "check"])
@pytest.mark.parametrize(
    "options", [["--uid=nobody"], ["--gid=nogroup"], ["--uid=nobody", "--gid=nogroup"]], ids=" ".join
)
def test_an_effective_user_alone_is_refused_before_anything_is_bound(run, tmp_path, options, more, daemon) -> None:
    where = ["--pidfile=d.pid", "--logfile=d.log"] if daemon else ["-n", "--pidfile="]
    assert_refused(run(*where, "--euid", *options, "rtservice", "--listen=unix:s", *more), "--euid: ", "--uid")
    assert not list(tmp_path.iterdir())


def test_euid_without_a_user_to_become_is_not_refused(run) -> None:
    result = run("-n", "--pidfile=", "--euid", "rtservice", "--check")
    assert (result.returncode, result.stdout) == (0, "rtservice: the configuration is valid\n")


@pytest.mark.parametrize("options", [["--uid=nobody"], ["--uid=nobody", "--gid=nogroup"]], ids=" ".join)
def test_a_user_has_nothing_of_the_groups_that_root_had(service, options) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (Debian: util-linux) is not installed")
    one = service(
        "--listen=tcp:0:interface=127.0.0.1",
        twistd=tuple(options),
        launcher=["setpriv", "--groups=4,27", "--"],
    )
    found = credentials(one.process.pid)
    assert found == {
        "Uid": {NOBODY},
        "Gid": {NOBODY},
        "Groups": {NOBODY},
        "CapPrm": {"0" * 16},
        "CapEff": {"0" * 16},
    }


@pytest.mark.parametrize("options", [["--uid=54321"], ["--uid=54321", "--gid=nogroup"]], ids=" ".join)
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["serve", "check"])
def test_a_user_that_is_not_there_is_one_line(run, tmp_path, options, check) -> None:
    assert_refused(
        run("-n", "--pidfile=", *options, "rtservice", "--listen=unix:s", *check), "--uid 54321: no such user"
    )
    assert not (tmp_path / "s").exists()


def test_a_group_without_a_user_is_a_warning_that_root_stays(service) -> None:
    one = service("--listen=tcp:0:interface=127.0.0.1", twistd=("--gid=nogroup",))
    one.wait_line(r"#warn\] --gid \d+ without --uid: what is served runs as root")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace (Debian: strace) is not installed")
def test_supplementary_groups_that_are_kept_refuse_the_start(environment, tmp_path) -> None:
    command = [
        *("strace", "-f", "-qq", "-o", "trace", "-e", "trace=setgroups", "-e", "inject=setgroups:retval=0"),
        *(BIN / "twistd", "-n", "--pidfile=", "--uid=nobody", "rtservice", "--listen=unix:s"),
    ]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        extra_groups=[4, 27],
    )
    assert "INJECTED" in (tmp_path / "trace").read_text(), result
    assert result.returncode == 1
    assert result.stderr == (
        "rtservice: --uid 65534: the process still has the supplementary group 4, which is not this user's\n"
    )
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(OSError, match="refused"):
        client.connect(str(tmp_path / "s"))
