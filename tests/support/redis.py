"""Redis servers and sentinels: real processes on free ports of 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiredis

from tests.support.deadline import DEADLINE
from tests.support.free_port import free_port
from tests.support.needs import needs
from tests.support.poll import poll

needs_redis = needs("redis-server", "redis-server")
needs_sentinel = needs("redis-sentinel", "redis-sentinel")


class RedisServer:
    """A redis-server. `options` are of its configuration, without dashes: `maxmemory="1mb"`.

    `login` are arguments of AUTH for `call`. With `tls` the port needs TLS; `call` uses a UNIX socket in any case.
    """

    program = "redis-server"

    def __init__(self, directory: Path, options: dict[str, str], *, tls: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        self.socket = str(directory / f"{self.port}.sock")
        self.login: tuple[str, ...] = ()
        port = {"port": "0", "tls-port": str(self.port)} if tls else {"port": str(self.port)}
        defaults = {"bind": "127.0.0.1", "unixsocket": self.socket, "save": "", "dir": str(directory)}
        self.options = {**defaults, "appendonly": "no", "repl-diskless-sync-delay": "0", **port, **options}
        self.process: Any = None

    def arguments(self) -> list[str]:
        return [word for name, value in self.options.items() for word in (f"--{name}", *(value.split() or [""]))]

    def start(self) -> RedisServer:
        """Start it, and wait until it answers."""
        with open(self.directory / f"{self.port}.log", "ab") as log:
            self.process = subprocess.Popen([self.program, *self.arguments()], stdout=log, stderr=log)
        poll(self._answers)
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.directory / f"{self.port}.log").read_text()
        with contextlib.suppress(OSError):
            return not str(self.call("PING")).startswith("LOADING")
        return False

    def call(self, *command: str | int) -> Any:
        """Execute a command, and return the reply; an error reply is returned, too."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(self.socket)
            replies = []
            reader = hiredis.Reader(notEnoughData=...)
            commands = ([("AUTH", *self.login)] if self.login else []) + [command]
            sock.sendall(b"".join(map(hiredis.pack_command, commands)))
            while len(replies) < len(commands):
                while (reply := reader.gets()) is ...:
                    data = sock.recv(1 << 16)
                    if not data:
                        raise ConnectionError("the server closed the connection")
                    reader.feed(data)
                replies.append(reply)
        return replies[-1]

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)

    def restart(self) -> None:
        """Kill it, and start it on the same port, without its data."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop it with SIGSTOP."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue after `freeze`."""
        os.kill(self.process.pid, signal.SIGCONT)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"


class Sentinel(RedisServer):
    """A redis-sentinel that watches a master under the name `mymaster`."""

    program = "redis-sentinel"

    def __init__(self, directory: Path, master: RedisServer, quorum: int) -> None:
        super().__init__(directory, {})
        self.file = directory / f"sentinel-{self.port}.conf"
        lines = [f"port {self.port}", "bind 127.0.0.1", f"unixsocket {self.socket}", f"dir {directory}"]
        lines += [f"sentinel monitor mymaster 127.0.0.1 {master.port} {quorum}"]
        lines += ["sentinel down-after-milliseconds mymaster 500", "sentinel failover-timeout mymaster 5000"]
        self.file.write_text("\n".join(lines) + "\n")

    def arguments(self) -> list[str]:
        return [str(self.file)]


class RedisGroup:
    """A master, a replica, and three sentinels."""

    def __init__(self, start: Callable[[RedisServer], RedisServer], directory: Path) -> None:
        self.master = start(RedisServer(directory, {}))
        self.replica = start(RedisServer(directory, {"replicaof": f"127.0.0.1 {self.master.port}"}))
        poll(lambda: self.replica.call("ROLE")[3] == b"connected")
        self.sentinels = [start(Sentinel(directory, self.master, 2)) for _ in range(3)]
        poll(self._complete)

    def _complete(self) -> bool:
        """Return whether each sentinel has found the replica and the others."""
        for sentinel in self.sentinels:
            pairs = sentinel.call("SENTINEL", "MASTER", "mymaster")
            state = dict(zip(pairs[::2], pairs[1::2], strict=True))
            if (state[b"num-slaves"], state[b"num-other-sentinels"]) != (b"1", b"2"):
                return False
        return True

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/mymaster"
