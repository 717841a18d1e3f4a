"""A Debian booted with systemd in a container with separate network, processes, control groups and file system.

This needs root, and a kernel that permits a container to boot. Otherwise every test that uses the machine is skipped
with a reason that begins with `no systemd can be booted here`. Debian is downloaded once, into $TESTS_CACHE
(~/.cache/rtservice-tests): 290 MB.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import rtservice
from tests.support.network import network_of
from tests.support.repository import ETC

SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,python3,procps"
BOOT = 120  # seconds; booting takes five on an idle machine, and test machines are busy
COMMAND = 60

# Units that the service does not need, masked for a faster boot.
MASKED = ("getty.target", "systemd-logind.service", "systemd-timesyncd.service", "apt-daily.timer", "e2scrub_all.timer")

# A separate mount namespace and control group on any host: cgroup2 only, as Debian's systemd requires, and a private
# /run, where nspawn leaves files. A signal that ends the boot goes to the whole process group: this shell ignores it,
# and cleans up.
LAUNCH = """
set -e
trap : TERM
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
group=/sys/fs/cgroup/rtservice-tests-$$
mkdir "$group"
status=0
sh -c 'echo $$ >"$0/cgroup.procs" && exec systemd-nspawn --quiet --boot --directory="$1" --machine=rtservice-tests \
    --register=no --keep-unit --private-network --notify-ready=yes --capability=CAP_BPF --system-call-filter=bpf \
    --resolv-conf=off --timezone=off --link-journal=no --console=pipe' "$group" "$2/root" || status=$?
find "$group" -depth -type d -exec rmdir {} ';'
exit "$status"
"""


class CannotBootError(Exception):
    """This host cannot boot a systemd; the message is the reason."""


class Machine:
    """The booted container; `leader` is the pid of its first process."""

    def __init__(self, leader: int) -> None:
        self._root = Path(f"/proc/{leader}/root")
        self._enter = [
            *("nsenter", f"--target={leader}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd=/"),
            *("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_COLORS=0", "SYSTEMD_PAGER="),
        ]
        self._leader = leader

    def run(self, *command: str) -> str:
        """Run a command in the machine; return its output, and fail the test if it fails."""
        result = subprocess.run(
            [*self._enter, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND
        )
        assert result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout

    def property(self, unit: str, name: str) -> str:
        """Return a property of `systemctl show`, such as StatusText."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal(self, unit: str) -> list[str]:
        """Return the log lines of a unit's processes, and those of systemd about the unit."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}").splitlines()

    def path(self, path: str) -> Path:
        """Return the path of a file of the machine on this host."""
        return self._root / path.lstrip("/")

    def network(self) -> contextlib.AbstractContextManager[None]:
        """Enter the network of the machine in this thread; sockets created meanwhile stay in that network."""
        return network_of(self._leader)


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with this package in /opt/rtservice, as in docs/howto/systemd.md, and the files of etc/."""
    with contextlib.ExitStack() as stack:
        try:
            directory = tmp_path_factory.mktemp("machine")
            booted = stack.enter_context(_boot(_debian(), directory))
        except CannotBootError as error:
            pytest.skip(f"no systemd can be booted here: {error}")
        yield booted


def _debian() -> Path:
    """Return the root of a minimal Debian, created at first use; raises CannotBootError."""
    if os.getuid() != 0:
        raise CannotBootError("root is required")
    for program, package in (
        ("debootstrap", "debootstrap"),
        ("systemd-nspawn", "systemd-container"),
        ("unshare", "util-linux"),
    ):
        if shutil.which(program) is None:
            raise CannotBootError(f"{program} (Debian: {package}) is not installed")
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode:  # before anything is downloaded
        raise CannotBootError(tried.stderr.strip())
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtservice-tests"
    cache = Path(os.environ.get("TESTS_CACHE") or default)
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / f"{SUITE}-{re.sub('[^a-z0-9]+', '-', PACKAGES)}"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            unfinished = cache / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            result = subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(unfinished)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if result.returncode:
                raise CannotBootError(f"debootstrap: {_last_line(result.stdout + result.stderr)}")
            # Packages are copied into the venv later, instead of installed with pip.
            subprocess.run(
                ["chroot", str(unfinished), "python3", "-m", "venv", "--without-pip", "/opt/rtservice"], check=True
            )
            unfinished.rename(root)
    return root


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _install(root: Path, venv: Path) -> None:
    """Copy the package, its dependencies and the files of etc/ into a root; `venv` is the venv of the machine."""
    opt = root / "opt" / "rtservice"
    (packages,) = (venv / "lib").glob("python3.*/site-packages")
    site = opt / packages.relative_to(venv)
    wanted, copied = ["twisted"], set[str]()  # the dependencies of rtservice
    while wanted:
        name = wanted.pop()
        if name in copied:
            continue
        copied.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):  # a dependency for other versions of Python
            distribution = metadata.distribution(name)
            for requirement in distribution.requires or []:
                if "extra ==" not in requirement:
                    wanted += re.findall(r"^[\w.-]+", requirement)
            for file in distribution.files or []:
                if ".." not in file.parts:
                    (site / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(distribution.locate_file(file), site / file)
    # An editable installation contains only a reference to these files.
    package = Path(rtservice.__file__).parent
    plugin = Path("twisted", "plugins", "rtservice_plugin.py")
    shutil.copytree(package, site / "rtservice", dirs_exist_ok=True)
    shutil.copy2(package.parent / plugin, site / plugin)
    (opt / "bin").mkdir()
    twistd = opt / "bin" / "twistd"
    twistd.write_text("#!/opt/rtservice/bin/python\nfrom twisted.scripts.twistd import run\nrun()\n")
    twistd.chmod(0o755)

    for pattern, place in (
        ("*.service", "systemd/system"),
        ("*.socket", "systemd/system"),
        ("*.service.d", "systemd/system"),
        ("*.toml", "rtservice"),
        ("*users.d", ""),
        ("*files.d", ""),
    ):
        for source in ETC.glob(pattern):
            destination = root / "etc" / place / source.name
            destination.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, destination)
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


@contextlib.contextmanager
def _boot(debian: Path, directory: Path) -> Iterator[Machine]:
    """Boot `debian` with a separate writable layer, and end it; raises CannotBootError."""
    for name in ("upper", "work", "root"):
        (directory / name).mkdir()
    _install(directory / "upper", debian / "opt" / "rtservice")
    console = directory / "console"
    name = f"rtservice-tests-{os.getpid()}"
    leader = 0
    with contextlib.ExitStack() as stack:
        notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notified.bind(f"\0{name}")
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", LAUNCH, "sh", str(debian), str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=stack.enter_context(open(console, "wb")),
            stderr=subprocess.STDOUT,
            env={**os.environ, "NOTIFY_SOCKET": f"@{name}"},
            start_new_session=True,
        )
        # The shell exits after its children, and removes its mounts and its control group.
        stack.callback(process.wait)
        # The machine needs no graceful shutdown: killing its first process ends it.
        stack.callback(lambda: _end(leader) if leader else os.killpg(process.pid, signal.SIGTERM))
        ended = os.pidfd_open(process.pid)
        stack.callback(os.close, ended)
        # nspawn forwards the notifications of the container's systemd, and blocks until they are read.
        with notified:
            ready = False
            while not ready:
                readable, _, _ = select.select([notified, ended], [], [], BOOT)
                if notified not in readable:
                    why = "it exited" if readable else f"it is not ready after {BOOT} s"
                    raise CannotBootError(f"{why}: {_last_line(console.read_text(errors='replace'))}")
                news = dict(line.split("=", 1) for line in notified.recv(4096).decode().splitlines())
                leader = int(news.get("X_NSPAWN_LEADER_PID", leader))
                ready = "READY" in news
        yield Machine(leader)


def _end(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGKILL)
