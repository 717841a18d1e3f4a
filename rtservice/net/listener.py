"""`Listener`: a bound, listening socket, and with workers, the sockets of the worker slots on the same port."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from rtservice.net.bpf import balance
from rtservice.net.crl import RevocationLists
from rtservice.net.description import ListenError
from rtservice.net.sockets import bind, cannot_listen, close_all, start_listening
from rtservice.net.tls import Certificate, Context, DirectoryTLS, Files, LoadedTLS, Reusable, ServerTLS, TLSError
from rtservice.steps import Steps, finish

Socket = socket.socket  # for classes with a field `socket`, which hides the module

# Number of slots that can be added after privileges were dropped, on any port. Each takes a descriptor per listener.
RESERVE_SOCKETS = 8


@dataclass(frozen=True)
class SocketFile:
    """The file of a UNIX socket that this process created and has to remove."""

    # A descriptor: the process may change its root, working directory or user after binding, which invalidates a path.
    directory: int
    name: str
    inode: int
    path: str

    def remove(self) -> None:
        """Remove the file, unless another process has replaced it. Raises OSError."""
        try:
            if os.stat(self.name, dir_fd=self.directory).st_ino == self.inode:
                os.unlink(self.name, dir_fd=self.directory)
        except FileNotFoundError:
            pass
        finally:
            os.close(self.directory)


@dataclass
class Listener:
    """A bound, listening, non-blocking socket, and its name in logs (`tcp:[::1]:8080`, `unix:/run/rt.sock`).

    With `tls`, its connections use TLS and present one of `certificates`. `revocation` and `warnings` come from
    `tls.LoadedTLS`, and `initial_fingerprint` is the `tls.fingerprint` of the files at the first load. With `proxied`,
    each connection begins with a PROXY header. A `shared` listener is also open in the process that passed it, which
    keeps its backlog.

    With workers, a TCP listener has `slot_sockets`, one for each slot, among which the kernel distributes new
    connections (SO_REUSEPORT of socket(7)); `socket` is the first of them. `reserve_sockets` are bound, but listen only
    when a slot is added: another socket can be bound only by the same user, and on a low port only with privileges, and
    the process may have changed its user and dropped its privileges by then.
    """

    socket: socket.socket
    name: str
    tls: Context | None = None
    certificates: tuple[Certificate, ...] = ()
    revocation: RevocationLists | None = None
    warnings: tuple[str, ...] = ()
    initial_fingerprint: tuple[object, ...] = ()
    proxied: bool = False
    shared: bool = False
    source: ServerTLS | DirectoryTLS | None = field(default=None, repr=False)
    reusable: Reusable = field(default_factory=Reusable, repr=False)
    slot_sockets: list[Socket] = field(default_factory=list, repr=False)
    reserve_sockets: list[Socket] = field(default_factory=list, repr=False)
    _backlog: int = 0
    _file: SocketFile | None = field(default=None, repr=False)

    def renew(self) -> LoadedTLS | None:
        """Read the certificate files again, and return the result for `adopt`; None without TLS.

        Raises ListenError. Changes nothing, so that all listeners can be read before one of them adopts.
        """
        return finish(self.renewing())

    def renewing(self, files: Files | None = None) -> Steps[LoadedTLS | None]:
        """Do the work of `renew` in steps. Current contexts are reused for unchanged bytes."""
        if self.source is None:
            return None
        try:
            return (yield from self.source.loading(files, self.reusable))
        except TLSError as error:
            raise ListenError(str(error)) from error

    def adopt(self, loaded: LoadedTLS) -> None:
        """Use a context and its certificates from now on."""
        loaded.take_effect()
        self.reusable = loaded.reusable
        self.tls = loaded.context
        self.certificates = loaded.certificates
        self.revocation = loaded.revocation
        self.warnings = loaded.warnings

    def tls_files(self) -> tuple[str, ...]:
        """Return the files that `renew` reads, for `tls.fingerprint`. A directory stands for the certificates in it."""
        return self.source.files() if self.source is not None else ()

    def of_slot(self, slot: int) -> Socket:
        """Return the socket on which the worker of this slot accepts."""
        return self.slot_sockets[slot] if self.slot_sockets else self.socket

    def add_slot(self) -> None:
        """Open the listening socket of one more slot: a reserve socket or a new one. Raises ListenError."""
        if not self.slot_sockets:
            return
        if self.reserve_sockets:
            sock = self.reserve_sockets.pop()
        else:
            host, port, *rest = self.socket.getsockname()
            scope = rest[1] if rest else 0
            try:
                sock = bind(self.socket.family, host, scope, port, reuse_port=True)
            except OSError as error:
                # All sockets of a port must belong to one user (SO_REUSEPORT of socket(7)), and a low port needs
                # privileges.
                if os.fstat(self.socket.fileno()).st_uid != os.geteuid():
                    raise ListenError(
                        f"{self.name} has no reserve socket left: {RESERVE_SOCKETS} were bound at the start, before "
                        "privileges were dropped; restart with more --workers"
                    ) from error
                raise cannot_listen(self.socket.family, host, port, error) from error
        try:
            start_listening(sock, self._backlog)
        except ListenError:
            sock.close()
            raise
        self.slot_sockets.append(sock)

    def balance_over(self, slots: Sequence[int]) -> None:
        """Distribute new connections at random over the sockets of these slots. Queued clients stay in their queue."""
        if self.slot_sockets:
            balance(self.socket, slots)

    def remove_slot(self) -> None:
        """Stop listening for the last slot, and keep its socket in reserve. Clients in its backlog are reset."""
        if self.slot_sockets:
            sock = self.slot_sockets.pop()
            try:
                # On Linux it stays bound. The process may no longer have the privileges to bind another.
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                sock.close()
            else:
                self.reserve_sockets.append(sock)

    @property
    def file(self) -> tuple[str, int] | None:
        """Path and inode of the file that `remove_file` would remove."""
        return None if self._file is None else (self._file.path, self._file.inode)

    def remove_file(self) -> None:
        """Remove the file of a UNIX socket that this process created: no new client connects. Raises OSError."""
        file, self._file = self._file, None
        if file is not None:
            file.remove()

    def close(self) -> None:
        """Close the sockets and remove the file. Raises OSError if the file cannot be removed."""
        close_all([self.socket, *self.slot_sockets, *self.reserve_sockets])
        self.remove_file()
