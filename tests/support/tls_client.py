"""A TLS client whose records the test sends."""

import contextlib
import select
import socket
import ssl
import time
from typing import Any

from tests.support.deadline import DEADLINE
from tests.support.reset import reset


class ResetError(Exception):
    """The server reset the connection."""


class Client:
    """A TLS client on a blocking socket; the test decides when to send records."""

    def __init__(self, address, context: ssl.SSLContext, *, receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(DEADLINE)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.sock.close()

    def flush(self) -> None:
        if data := self.outgoing.read():
            self.sock.sendall(data)

    def feed(self) -> None:
        """Read once from the socket; raises ResetError."""
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionResetError:
            raise ResetError from None
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def shake(self, *, finish: bool = True) -> "Client":
        """Do the handshake; without `finish`, the last flight is sent by the next `flush`."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self.feed()
            else:
                break
        if finish:
            self.flush()
        return self

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view[: 1 << 18]) :]
            self.flush()

    def read(self) -> bytes:
        """Return data; b"" at the server's close_notify. Raises SSLEOFError at a FIN without one, and ResetError."""
        while True:
            try:
                return self.tls.read(1 << 16)
            except ssl.SSLZeroReturnError:  # instead of b"", after we sent close_notify
                return b""
            except ssl.SSLWantReadError:
                self.feed()

    def read_exactly(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            piece = self.read()
            assert piece, f"close_notify after {len(received)} bytes of {size}"
            received += piece
        return bytes(received)

    def read_to_end(self) -> bytes:
        """Return all data until the server's close_notify, which FIN must follow."""
        received = bytearray()
        while piece := self.read():
            received += piece
        assert not self.incoming.pending
        assert self.sock.recv(100) == b""
        return bytes(received)

    def close_notify(self) -> None:
        """Send close_notify; data from the server can still be read."""
        assert not self.incoming.pending  # OpenSSL would search it for the server's close_notify
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.flush()

    def fin(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        reset(self.sock)

    def exchange(self, data: bytes) -> bytes:
        """Send and read concurrently, send close_notify after the data, and read until the server's."""
        received = bytearray()
        view = memoryview(data)
        waiting = memoryview(b"")
        notified = False
        self.sock.setblocking(False)
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            if not waiting:
                if view:
                    view = view[self.tls.write(view[: 1 << 16]) :]
                elif not notified and not self.incoming.pending:
                    notified = True
                    with contextlib.suppress(ssl.SSLWantReadError):
                        self.tls.unwrap()
                waiting = memoryview(self.outgoing.read())
            readable, writable, _ = select.select([self.sock], [self.sock] if waiting else [], [], 1)
            if writable:
                waiting = waiting[self.sock.send(waiting) :]
            if readable:
                self.feed()
                try:
                    while piece := self.tls.read(1 << 16):
                        received += piece
                    return bytes(received)
                except ssl.SSLZeroReturnError:
                    return bytes(received)
                except ssl.SSLWantReadError:
                    pass
        raise AssertionError("the deadline has passed")
