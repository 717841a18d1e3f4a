"""Load generator for machines without a C compiler: ``load.c`` in Python, several times slower.

Options and JSON output are the same. It cannot measure ``fanout``.
"""

import argparse
import json
import select
import socket
import ssl
import time
from pathlib import Path
from typing import Any


class Client:
    """One connection that has received the greeting, with at most one message in flight."""

    def __init__(self, options: argparse.Namespace, context: ssl.SSLContext | None) -> None:
        self.began = time.perf_counter()
        connection = socket.create_connection(("127.0.0.1", options.port), 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = context.wrap_socket(connection) if context else connection
        greeting = options.greeting.encode()
        if (got := self.take(len(greeting))) != greeting:
            raise SystemExit(f"load: unexpected greeting: {got!r}")

    def take(self, length: int) -> bytes:
        """Receive exactly `length` bytes."""
        data = b""
        while len(data) < length:
            chunk = self.socket.recv(length - len(data))
            if not chunk:
                raise SystemExit("load: the server closed a connection during an exchange")
            data += chunk
        return data

    def begin(self, message: bytes) -> None:
        """Send a message, as much as the socket accepts."""
        self.began = time.perf_counter()
        self.unsent = memoryview(message)
        self.missing = len(message)
        self.advance(message)

    def advance(self, message: bytes) -> bool:
        """Send and receive without blocking. Return whether the echo is complete."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        try:
            while self.missing:
                chunk = self.socket.recv(self.missing)
                offset = len(message) - self.missing
                if not chunk:
                    raise SystemExit("load: the server closed a connection during an exchange")
                if chunk != message[offset : offset + len(chunk)]:
                    raise SystemExit("load: the echo differs from the message")
                self.missing -= len(chunk)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        return not self.missing


class Window:
    """The measured time: finished exchanges, latencies and CPU time."""

    def __init__(self, options: argparse.Namespace) -> None:
        # CPUCLOCK_SCHED of a process, as computed by clock_getcpuclockid(3).
        self.clocks = [~pid << 3 | 2 for pid in options.pid]
        self.start = time.perf_counter() + options.warmup
        self.end: float = self.start + options.seconds
        self.latencies: list[float] = []
        self.before: tuple[float, float, float] | None = None

    def costs(self) -> tuple[float, float, float]:
        """Return the time, and the CPU seconds of the server and of this process."""
        return time.perf_counter(), sum(map(time.clock_gettime, self.clocks)), time.process_time()

    def count(self, began: float) -> bool:
        """Count an exchange that began at `began`. Return False after the end of the measured time."""
        now = time.perf_counter()
        if now >= self.start:
            if self.before is None:
                self.before = self.costs()
            self.latencies.append(now - began)
        return now < self.end

    def result(self) -> dict[str, Any]:
        """Return the figures, with the names of load.c."""
        if self.before is None:
            raise SystemExit("load: no exchange was finished")
        now = self.costs()
        elapsed, server, own = (after - before for before, after in zip(self.before, now, strict=True))
        ordered = sorted(self.latencies)
        figures = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
        return {
            "messages": len(ordered),
            "seconds": elapsed,
            "server_cpu_seconds": server,
            "load_cpu_seconds": own,
            **{name: 1e6 * ordered[int(share * len(ordered))] for name, share in figures.items()},
        }


def exchange(options: argparse.Namespace, context: ssl.SSLContext | None, message: bytes) -> dict[str, Any]:
    """On every connection: send a message, wait for the whole echo, and repeat."""
    poll = select.epoll()
    clients = {}
    for _ in range(options.connections):
        client = Client(options, context)
        client.socket.setblocking(False)
        clients[client.socket.fileno()] = client
        # Edge-triggered: one registration serves reading and writing.
        poll.register(client.socket, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
    window = Window(options)
    for client in clients.values():
        client.begin(message)
    while time.perf_counter() < window.end:
        for descriptor, _ in poll.poll(1):
            client = clients[descriptor]
            if client.advance(message):
                window.count(client.began)
                client.begin(message)
    return window.result()


def churn(options: argparse.Namespace, context: ssl.SSLContext | None, message: bytes) -> dict[str, Any]:
    """Open all connections, exchange one message on each, close them, and repeat."""
    window = Window(options)
    going = True
    while going:
        clients = [Client(options, context) for _ in range(options.connections)]
        for client in clients:
            client.socket.sendall(message)
        for client in clients:
            if client.take(len(message)) != message:
                raise SystemExit("load: the echo differs from the message")
            client.socket.shutdown(socket.SHUT_WR)
        for client in clients:
            if client.socket.recv(1):
                raise SystemExit("load: the server sent more than the echo")
            client.socket.close()
            going = window.count(client.began) and going
    return window.result()


def idle(options: argparse.Namespace, context: ssl.SSLContext | None, message: bytes) -> dict[str, Any]:
    """Open connections that exchange one message and stay open, and measure the server's memory."""
    clients: list[Client] = []

    def open_until(count: int) -> int:
        while len(clients) < count:
            clients.append(Client(options, context))
            clients[-1].socket.sendall(message)
            clients[-1].take(len(message))
        time.sleep(0.5)
        rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in options.pid)
        lines = [line for rollup in rollups for line in rollup.splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    before = open_until(first := min(100, options.connections // 2))
    grown = open_until(options.connections) - before
    return {
        "connections": options.connections - first,
        "resident_kib_before": before,
        "resident_kib_grown": grown,
    }


def main() -> None:
    """Run with the options and output of load.c."""
    parser = argparse.ArgumentParser(prog="load", description=__doc__)
    parser.add_argument("--mode", choices=["exchange", "churn", "idle", "fanout"], default="exchange")
    parser.add_argument("--greeting", default="")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--pid", type=int, action="append", default=[])
    parser.add_argument("--publishers")
    for name in ("port", "connections", "size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("seconds", "warmup"):
        parser.add_argument(f"--{name}", type=float, required=True)
    options = parser.parse_args()
    if options.mode == "fanout":
        raise SystemExit("load: fanout needs a C compiler: the load generator in Python would be the limit")
    context = None
    if options.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    message = bytes(i * 131 >> 3 & 255 for i in range(options.size))
    run = {"exchange": exchange, "churn": churn, "idle": idle}[options.mode]
    print(json.dumps(run(options, context, message)))


if __name__ == "__main__":
    main()
