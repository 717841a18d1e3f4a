"""The hint at the end of a start: how to try the service, and how to stop it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from rtservice.net.description import ListenError, parse

# Shipped protocols that answer a person at a terminal.
_CONVERSE = frozenset(("echo", "chat"))

# Addresses of listeners that a client on this host reaches as localhost.
_LOCAL = frozenset(("", "0.0.0.0", "::", "127.0.0.1", "::1"))


def first_steps(protocol: str, listeners: Iterable[str], *, terminal: bool) -> str:
    """Return what to type to try the service, if there is a simple command, and to stop it.

    `protocol` is the value of `--protocol`, `listeners` are the names of the bound listeners. `terminal` says whether
    the service can be stopped with Ctrl-C.
    """
    stop = f"stop it with {'Ctrl-C' if terminal else 'SIGTERM'}"
    commands = [command for name in listeners if (command := _client_of(name))] if protocol in _CONVERSE else []
    # A plain listener is the easier one to try.
    commands.sort(key=lambda command: not command.startswith("nc"))
    return f"try it with `{commands[0]}`, {stop}" if commands else stop


def _client_of(name: str) -> str:
    """Return the command of a client for a listener, or an empty text if that takes more than a command."""
    try:
        read = parse(name)
    except ListenError:
        return ""
    if read.prefixes:  # a PROXY header, or TLS over a UNIX socket
        return ""
    if read.kind == "unix":
        return f"nc -U {shlex.quote(read.positional[0])}"
    if read.kind not in ("tcp", "tcp6", "ssl"):
        return ""
    interface = read.interface
    host = "localhost" if interface in _LOCAL else interface
    port = read.positional[0]
    if read.kind != "ssl":
        return f"nc {host} {port}"
    return f"openssl s_client -quiet -connect {f'[{host}]' if ':' in host else host}:{port}"
