"""`Listener`: a bound, listening socket, and for worker slots the sockets that share its port."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from rtservice.net.bpf import balance
from rtservice.net.crl import RevocationLists
from rtservice.net.description import ListenError
from rtservice.net.sockets import bind, cannot_listen, close_all, start_listening
from rtservice.net.tls import (
    Certificate,
    Context,
    DirectoryTLS,
    Files,
    LoadedTLS,
    Reusable,
    ServerTLS,
    Steps,
    TLSError,
    finish,
)

Socket = socket.socket  # where a field of this name hides the module

# Slots that can be added after privileges were dropped, on any port. Each is a descriptor for each listener.
RESERVE_SOCKETS = 8


@dataclass(frozen=True)
class SocketFile:
    """The file of a UNIX socket that this process made, and has to remove."""

    # Held, and not the path, since the process may change its root, its directory or its user after binding.
    directory: int
    name: str
    inode: int
    path: str

    def remove(self) -> None:
        """Remove the file, unless a successor has put its own in its place; raises OSError."""
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

    With `tls`, its connections are in TLS and are shown one of `certificates`. `revocation` and `warnings` are those of
    a `tls.LoadedTLS`, and `initial_fingerprint` is the `tls.fingerprint` of the files that were read first. With
    `proxied`, each connection begins with a PROXY header. A `shared` listener is also held by the process that passed
    it, which keeps its queue.

    For worker processes a TCP listener has `slot_sockets`, one for each slot, among which the kernel distributes new
    connections (SO_REUSEPORT of socket(7)); `socket` is the first of them. `reserve_sockets` are bound and do not
    listen until a slot is added: only the user that bound the others may bind one more, and a low port takes
    privileges; both can be gone by then.
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
        """Read the files of its certificates again, and give what to `adopt` then; None without TLS.

        Raises ListenError. Nothing is changed, so that of several listeners all can be read before any adopts.
        """
        return finish(self.renewing())

    def renewing(self, files: Files | None = None) -> Steps[LoadedTLS | None]:
        """The same in steps. What is in force for the same bytes is not made again."""
        if self.source is None:
            return None
        try:
            return (yield from self.source.loading(files, self.reusable))
        except TLSError as error:
            raise ListenError(str(error)) from error

    def adopt(self, loaded: LoadedTLS) -> None:
        """Put a context and its certificates in force."""
        loaded.take_effect()
        self.reusable = loaded.reusable
        self.tls = loaded.context
        self.certificates = loaded.certificates
        self.revocation = loaded.revocation
        self.warnings = loaded.warnings

    def tls_files(self) -> tuple[str, ...]:
        """The files that `renew` reads, for `tls.fingerprint`; a directory stands for the certificates in it."""
        return self.source.files() if self.source is not None else ()

    def of_slot(self, slot: int) -> Socket:
        """The socket on which the process of this slot accepts."""
        return self.slot_sockets[slot] if self.slot_sockets else self.socket

    def add_slot(self) -> None:
        """Listen for one more slot, on a reserve socket or a new one. Raises ListenError."""
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
                # Sockets of one port are one user's (SO_REUSEPORT of socket(7)), and a low port takes privileges.
                if os.fstat(self.socket.fileno()).st_uid != os.geteuid():
                    raise ListenError(
                        f"{self.name} has no reserve socket left: {RESERVE_SOCKETS} more than at the start were bound "
                        "before privileges were dropped; start with more --workers"
                    ) from error
                raise cannot_listen(self.socket.family, host, port, error) from error
        try:
            start_listening(sock, self._backlog)
        except ListenError:
            sock.close()
            raise
        self.slot_sockets.append(sock)

    def balance_over(self, slots: Sequence[int]) -> None:
        """Distribute new connections over the sockets of these slots, at random. Queued clients stay where they are."""
        if self.slot_sockets:
            balance(self.socket, slots)

    def remove_slot(self) -> None:
        """Stop listening for the last slot, and keep its socket in reserve. Clients in its queue are reset."""
        if self.slot_sockets:
            sock = self.slot_sockets.pop()
            try:
                sock.shutdown(socket.SHUT_RDWR)  # on Linux it stays bound: privileges to bind another may be gone
            except OSError:
                sock.close()
            else:
                self.reserve_sockets.append(sock)

    @property
    def file(self) -> tuple[str, int] | None:
        """Path and inode of the file that `remove_file` would remove."""
        return None if self._file is None else (self._file.path, self._file.inode)

    def remove_file(self) -> None:
        """Remove the file of a UNIX socket, if it has one of ours, so that nobody new finds it; raises OSError."""
        file, self._file = self._file, None
        if file is not None:
            file.remove()

    def close(self) -> None:
        """Close the socket and remove its file; raises OSError when the file cannot be removed."""
        close_all([self.socket, *self.slot_sockets, *self.reserve_sockets])
        self.remove_file()
