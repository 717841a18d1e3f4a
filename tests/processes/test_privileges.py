"""Privileges of root that remain after --uid, --gid and --euid."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import BIN
from tests.support.deadline import DEADLINE
from tests.support.refused import assert_refused

NOBODY = "65534"

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user")


def credentials(pid: int) -> dict[str, set[str]]:
    """Return the user, group and capability fields of proc_pid_status(5), each as a set of its values."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: set(fields[name].split()) for name in ("Uid", "Gid", "Groups", "CapPrm", "CapEff")}


@pytest.mark.parametrize("daemon", [False, True], ids=["foreground", "daemon"])
@pytest.mark.parametrize("more", [[], ["--workers=2"], ["--check"]], ids=["single-process", "workers", "check"])
@pytest.mark.parametrize(
    "options", [["--uid=nobody"], ["--gid=nogroup"], ["--uid=nobody", "--gid=nogroup"]], ids=" ".join
)
def test_euid_with_a_user_is_rejected_before_anything_is_bound(run, tmp_path, options, more, daemon) -> None:
    where = ["--pidfile=d.pid", "--logfile=d.log"] if daemon else ["-n", "--pidfile="]
    assert_refused(run(*where, "--euid", *options, "rtservice", "--listen=unix:s", *more), "--euid: ", "--uid")
    assert not list(tmp_path.iterdir())


def test_euid_without_a_user_is_accepted(run) -> None:
    result = run("-n", "--pidfile=", "--euid", "rtservice", "--check")
    assert (result.returncode, result.stdout) == (0, "rtservice: the configuration is valid\n")


@pytest.mark.parametrize("options", [["--uid=nobody"], ["--uid=nobody", "--gid=nogroup"]], ids=" ".join)
def test_supplementary_groups_of_root_are_dropped(service, options) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (Debian: util-linux) is not installed")
    running = service(
        "--listen=tcp:0:interface=127.0.0.1",
        twistd=tuple(options),
        launcher=["setpriv", "--groups=4,27", "--"],
    )
    found = credentials(running.process.pid)
    assert found == {
        "Uid": {NOBODY},
        "Gid": {NOBODY},
        "Groups": {NOBODY},
        "CapPrm": {"0" * 16},
        "CapEff": {"0" * 16},
    }


@pytest.mark.parametrize(
    ("options", "gid"),
    [(["--uid=54321"], "54321"), (["--uid=54321", "--gid=65533"], "65533"), (["--uid=54321", "--gid=nogroup"], NOBODY)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_without_a_passwd_entry_gets_only_its_group(service, options, gid) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", twistd=tuple(options))
    nothing = {"0" * 16}
    assert credentials(running.process.pid) == {
        "Uid": {"54321"},
        "Gid": {gid},
        "Groups": {gid},
        "CapPrm": nothing,
        "CapEff": nothing,
    }
    with running.connect() as client:
        assert client.recv(100) == b"Hello from the server!"


def test_a_user_is_looked_up_before_chroot(service, tmp_path) -> None:
    """The new root has no passwd file and no NSS libraries, as is usual."""
    running = service("--listen=unix:/s", twistd=(f"--chroot={tmp_path}", "--uid=nobody"))
    found = credentials(running.process.pid)
    assert (found["Uid"], found["Gid"], found["Groups"]) == ({NOBODY}, {NOBODY}, {NOBODY})


@pytest.mark.parametrize("check", [[], ["--check"]], ids=["serve", "check"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--uid=-1"], ["--uid -1: out of range; accepted are 0 to"]),
        (["--uid=54321", "--gid=4294967295"], ["--gid 4294967295: out of range; accepted are 0 to"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_invalid_user_is_one_error_line(run, tmp_path, options, words, check) -> None:
    result = run("-n", "--pidfile=", *options, "rtservice", "--listen=unix:s", *check)
    assert_refused(result, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (Debian: util-linux) is not installed")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--chroot=."], ["--chroot .: operation not permitted; this needs root"]),
        (["--uid=54321"], ["--uid 54321: operation not permitted; this needs root"]),
        (["--gid=54321"], ["--gid 54321: operation not permitted; this needs root"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_missing_privileges_are_one_error_line_before_anything_is_bound(environment, tmp_path, options, words) -> None:
    # Root without capabilities, because other users may not be able to read the interpreter.
    command = ["setpriv", "--bounding-set=-sys_chroot,-setuid,-setgid", "--inh-caps=-all", "--"]
    command += [BIN / "twistd", "-n", "--pidfile=", *options, "rtservice", "--listen=unix:s"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert_refused(result, *words)
    assert not list(tmp_path.iterdir())


def test_a_chroot_without_dev_null_is_rejected_for_daemons_and_workers(run, tmp_path) -> None:
    (tmp_path / "root").mkdir()
    chroot = f"--chroot={tmp_path}/root"
    for twistd, more in ((["--logfile=d.log"], []), (["-n"], ["--workers=2"])):
        result = run(*twistd, "--pidfile=", chroot, "rtservice", "--listen=unix:/s", *more)
        assert_refused(result, f"--chroot {tmp_path}/root: ", "/dev/null")
        assert not list((tmp_path / "root").iterdir())


def test_gid_without_uid_logs_that_privileges_are_kept(service) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", twistd=("--gid=nogroup",))
    assert running.wait_event("privileges.kept")["level"] == "warn"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace (Debian: strace) is not installed")
def test_remaining_supplementary_groups_fail_the_start(environment, tmp_path) -> None:
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
        "rtservice: --uid 65534: the process still has the supplementary group 4, which this user does not have\n"
    )
    assert not (tmp_path / "s").exists()
