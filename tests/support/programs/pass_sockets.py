"""Start a program with listening sockets from descriptor 3 on, as a service manager does (sd_listen_fds(3)).

Arguments: the names for LISTEN_FDNAMES, or nothing; the sockets, separated by commas, each the number of a descriptor,
`tcp` for a new one on loopback, or the path of a new UNIX socket; the program and its arguments.
"""

import fcntl
import os
import socket
import sys


def descriptor(what: str) -> int:
    """Return the number of a listening socket."""
    if what.isdigit():
        return int(what)
    if what == "tcp":
        return socket.create_server(("127.0.0.1", 0)).detach()
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(what)
    unix.listen()
    return unix.detach()


names, sockets, *command = sys.argv[1:]
# Move all sockets to high numbers first: one may have a number that is needed for another.
moved = [fcntl.fcntl(descriptor(what), fcntl.F_DUPFD_CLOEXEC, 50) for what in sockets.split(",")]
for to, fd in enumerate(moved, 3):
    os.dup2(fd, to, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(moved)))
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execvp(command[0], command)
