"""Checks before anything is bound: directories, the pidfile, root and user, descriptors."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from typing import Any

from rtservice.config.values import SettingError, printable
from rtservice.observe.logs import Log
from rtservice.startup.credentials import Credentials, CredentialsError, resolve
from rtservice.startup.dry_run import problem_of


def open_standard_descriptors() -> None:
    """Open those of 0 to 2 that are closed; twistd replaces them all when it daemonizes, and must not find ours."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def install_reactor(log: Log) -> None:
    """Make our reactor the process's, unless it has one: chosen by the user, or by `twist`, which imports it early."""
    if "twisted.internet.reactor" in sys.modules:
        return
    try:
        from rtservice.net import reactor
    except ImportError as error:  # no epoll(7)
        log.warn(
            "{platform} has no reactor of ours ({error}): serving on Twisted's", platform=sys.platform, error=error
        )
    else:
        reactor.install()


def path_resolver(twistd: Any) -> Callable[[str], str]:
    """Paths as twistd will see them once it has changed its root and its directory, which it has not yet."""
    root = twistd.get("chroot")
    directory = twistd.get("rundir") or "."
    if root is None:
        return lambda path: os.path.abspath(os.path.join(directory, path))
    # twistd starts in / of the new root unless --rundir says otherwise.
    return lambda path: os.path.join(
        os.path.abspath(root), os.path.normpath(os.path.join("/", directory, path)).lstrip("/")
    )


def check_working_directory() -> None:
    """Reject one that is gone: relative paths, the pidfile's for one, begin nowhere then. Raises SettingError."""
    try:
        os.getcwd()
    except OSError as error:
        raise SettingError(
            f"the working directory cannot be used: {reason(error)}; change to another directory first"
        ) from None


def check_directories(twistd: Any, resolve_path: Callable[[str], str]) -> None:
    """Find where twistd itself would fail, with a traceback, when everything is bound already. Raises SettingError."""
    rundir = twistd.get("rundir")
    if twistd.get("chroot") is not None:
        _check_directory(f"--chroot {printable(twistd['chroot'])}", twistd["chroot"])
    elif rundir == ".":  # twistd's default, into which it changes, too
        _check_directory("the working directory", rundir, "; change to another, or name one with --rundir")
    elif rundir is not None:
        _check_directory(f"--rundir {printable(rundir)}", rundir)
    given = twistd.get("pidfile")
    if given:
        check_pidfile(given, resolve_path)
        path = resolve_path(given)
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            raise SettingError(f"--pidfile {printable(given)}: no such directory: {printable(directory)}")
        if not os.access(path if os.path.exists(path) else directory, os.W_OK):
            raise SettingError(f"--pidfile {printable(given)}: permission denied")


def _check_directory(name: str, path: str, hint: str = "") -> None:
    """Find why a directory could not be the working directory of this process. Raises SettingError."""
    try:
        problem = "" if stat.S_ISDIR(os.stat(path).st_mode) else "not a directory"
    except FileNotFoundError:
        problem = "no such directory"
    except OSError as error:
        problem = reason(error)
    if not problem and not os.access(path, os.X_OK, effective_ids=True):
        problem = "permission denied"
    if problem:
        raise SettingError(f"{name}: {problem}{hint}")


def check_pidfile(given: str | None, resolve_path: Callable[[str], str]) -> None:
    """Reject what is at the path of the pidfile, if twistd would wait for ever there, or fail. Raises SettingError."""
    if not given:
        return
    name = f"--pidfile {printable(given)}"
    path = resolve_path(given)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device: to open one may take for ever
            raise SettingError(f"{name}: not a regular file")
        with open(path, "rb") as file:
            content = file.read(64)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingError(f"{name}: {reason(error)}") from None
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content):
        raise SettingError(f"{name}: it holds no process id; remove it unless a service uses it")


def check_changes(twistd: Any, credentials: Credentials, slots: int) -> None:
    """Find whether root and user can be changed as twistd is told to. Raises SettingError.

    Nothing is bound yet, and nothing of this can be taken back: a child process tries.
    """
    root, rundir = twistd.get("chroot"), twistd.get("rundir")
    if root is None and not credentials:
        return

    def change() -> str | None:
        if root is not None:
            name, what = f"--chroot {printable(root)}", "it takes root, or its capability sys_chroot"
            try:
                os.chroot(root)
                name, what = f"--rundir {printable(rundir)}", "in the new root"
                os.chdir("/" if rundir == "." else rundir)  # as twistd does
                if not twistd.get("nodaemon") or slots > 1:
                    name, what = f"--chroot {printable(root)}", "/dev/null, which daemons and workers need, is missing"
                    os.close(os.open(os.devnull, os.O_RDWR))
            except FileNotFoundError:
                return f"{name}: no such {'file or ' if 'dev' in what else ''}directory; {what}"
            except OSError as error:
                return f"{name}: {reason(error)}; {what}"
        try:
            credentials.assume()
        except CredentialsError as error:
            return str(error)
        return None

    problem = problem_of(change)
    if problem is not None:
        raise SettingError(problem)


# Descriptors that a start takes after everything is bound, at the most at once: those by which the reactor hears of
# signals, the pidfile, the pipe of a daemon; and some for clients. Each worker has four pipes, and eight for a moment.
_DESCRIPTORS_LEFT, _WORKER_DESCRIPTORS, _SPAWN_DESCRIPTORS = 8, 4, 5


def check_descriptors(slots: int, limit: int) -> None:
    """Find whether there are enough descriptors for what remains. Raises SettingError.

    Twisted's reactor would go on without hearing of signals, and a worker could not be spawned.
    """
    wanted = _DESCRIPTORS_LEFT + (_SPAWN_DESCRIPTORS + slots * _WORKER_DESCRIPTORS if slots > 1 else 0)
    held: list[int] = []
    try:
        while len(held) < wanted:
            held.append(os.dup(2))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise SettingError(
            f"the limit of descriptors (ulimit -n, LimitNOFILE=) is {limit}; "
            f"this service takes {limit + wanted - len(held)} at the least"
        ) from None
    finally:
        for descriptor in held:
            os.close(descriptor)


def credentials_of(twistd: Any, log: Log) -> Credentials:
    """What --uid and --gid have the process run as.

    Rejects what cannot be, or would keep root within reach of hosted code. Raises SettingError.
    """
    uid, gid = twistd.get("uid"), twistd.get("gid")
    if twistd.get("euid") and (uid is not None or gid is not None):
        # The real user stays root, in workers too: seteuid(0), one call in hosted code, takes everything back.
        raise SettingError(
            "--euid: any code that is served could become root again, since only the effective user changes; "
            "leave it out, and --uid gives root up for good"
        )
    if gid is not None and uid is None and os.geteuid() == 0:
        log.warn(
            "--gid {gid} without --uid: what is served runs as root, with the supplementary groups of root", gid=gid
        )
    try:
        return resolve(uid, gid)
    except CredentialsError as error:
        raise SettingError(str(error)) from None
