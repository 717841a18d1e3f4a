"""Checks before anything is bound: directories, pidfile, root directory, user, descriptors."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Callable
from typing import Any

from rtservice.config.values import SettingError
from rtservice.escaping import escaped
from rtservice.events import PRIVILEGES_KEPT, START_REACTOR_UNAVAILABLE
from rtservice.observe.logs import Log
from rtservice.startup.credentials import Credentials, CredentialsError, resolve
from rtservice.startup.dry_run import problem_of


def open_standard_descriptors() -> None:
    """Open /dev/null for those of descriptors 0 to 2 that are closed.

    twistd replaces all three when it daemonizes. Without this they could be sockets of the service.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def reason(error: OSError) -> str:
    """Return the system's text of an error, beginning in lower case."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def install_reactor(log: Log) -> None:
    """Install rtservice's reactor, unless the user has chosen one, or `twist`, which imports it early."""
    if "twisted.internet.reactor" in sys.modules:
        return
    try:
        from rtservice.net import reactor
    except ImportError as error:  # no epoll(7)
        START_REACTOR_UNAVAILABLE.log(log, platform=sys.platform, problem=str(error))
    else:
        reactor.install()


def path_resolver(twistd: Any) -> Callable[[str], str]:
    """Return a function that resolves paths as after twistd's later change of root and working directory."""
    root = twistd.get("chroot")
    directory = twistd.get("rundir") or "."
    if root is None:
        return lambda path: os.path.abspath(os.path.join(directory, path))
    # twistd starts in / of the new root unless --rundir is given.
    return lambda path: os.path.join(
        os.path.abspath(root), os.path.normpath(os.path.join("/", directory, path)).lstrip("/")
    )


def check_working_directory() -> None:
    """Reject a working directory that was removed: relative paths, such as the pidfile's, need it.

    Raises SettingError.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise SettingError(
            f"the working directory cannot be used: {reason(error)}; change to another directory first"
        ) from None


def check_directories(twistd: Any, resolve_path: Callable[[str], str]) -> None:
    """Check directories and pidfile, with which twistd would fail later, with a traceback. Raises SettingError."""
    rundir = twistd.get("rundir")
    if twistd.get("chroot") is not None:
        _check_directory(f"--chroot {escaped(twistd['chroot'])}", twistd["chroot"])
    elif rundir == ".":  # the default, to which twistd changes too
        _check_directory("the working directory", rundir, "; change to another directory, or set --rundir")
    elif rundir is not None:
        _check_directory(f"--rundir {escaped(rundir)}", rundir)
    given = twistd.get("pidfile")
    if given:
        check_pidfile(given, resolve_path)
        path = resolve_path(given)
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            raise SettingError(f"--pidfile {escaped(given)}: no such directory: {escaped(directory)}")
        if not os.access(path if os.path.exists(path) else directory, os.W_OK):
            raise SettingError(f"--pidfile {escaped(given)}: permission denied")


def _check_directory(name: str, path: str, hint: str = "") -> None:
    """Check that a directory can be the working directory of this process. Raises SettingError."""
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
    """Reject a pidfile on which twistd would block forever or fail. Raises SettingError."""
    if not given:
        return
    name = f"--pidfile {escaped(given)}"
    path = resolve_path(given)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe or a device may block forever
            raise SettingError(f"{name}: not a regular file")
        with open(path, "rb") as file:
            content = file.read(64)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingError(f"{name}: {reason(error)}") from None
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", content):
        raise SettingError(f"{name}: the file does not contain a process id; remove it unless a service uses it")


def check_changes(twistd: Any, credentials: Credentials, slots: int) -> None:
    """Check that root directory and user can be changed as twistd's options require. Raises SettingError.

    A child process tries the changes, since they cannot be undone.
    """
    root, rundir = twistd.get("chroot"), twistd.get("rundir")
    if root is None and not credentials:
        return

    def change() -> str | None:
        if root is not None:
            name, what = f"--chroot {escaped(root)}", "this needs root or the capability sys_chroot"
            try:
                os.chroot(root)
                name, what = f"--rundir {escaped(rundir)}", "in the new root"
                os.chdir("/" if rundir == "." else rundir)  # as twistd does
                if not twistd.get("nodaemon") or slots > 1:
                    name, what = f"--chroot {escaped(root)}", "/dev/null, which daemons and workers need, is missing"
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


# Descriptors that a start needs after all sockets are bound: for the signals of the reactor, the pidfile, the pipe of a
# daemon, and some clients. Each worker needs four pipes, and further descriptors while it is spawned.
_DESCRIPTORS_LEFT, _WORKER_DESCRIPTORS, _SPAWN_DESCRIPTORS = 8, 4, 5


def check_descriptors(slots: int, limit: int) -> None:
    """Check that enough descriptors are left for the rest of the start. Raises SettingError.

    Without this, Twisted's reactor would continue without receiving signals, and workers could not be spawned.
    """
    needed = _DESCRIPTORS_LEFT + (_SPAWN_DESCRIPTORS + slots * _WORKER_DESCRIPTORS if slots > 1 else 0)
    held: list[int] = []
    try:
        while len(held) < needed:
            held.append(os.dup(2))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise SettingError(
            f"the limit of descriptors (ulimit -n, LimitNOFILE=) is {limit}; "
            f"this service needs at least {limit + needed - len(held)}"
        ) from None
    finally:
        for descriptor in held:
            os.close(descriptor)


def credentials_of(twistd: Any, log: Log) -> Credentials:
    """Return the credentials of --uid and --gid.

    Raises SettingError if they are invalid, or if hosted code could regain root.
    """
    uid, gid = twistd.get("uid"), twistd.get("gid")
    if twistd.get("euid") and (uid is not None or gid is not None):
        # The real user stays root, also in workers, and hosted code can regain root with seteuid(0).
        raise SettingError(
            "--euid: only the effective user changes, and hosted code could become root again; "
            "remove it, and --uid drops root permanently"
        )
    if gid is not None and uid is None and os.geteuid() == 0:
        PRIVILEGES_KEPT.log(log, gid=gid)
    try:
        return resolve(uid, gid)
    except CredentialsError as error:
        raise SettingError(str(error)) from None
