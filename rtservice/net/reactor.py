"""An epoll reactor with Twisted's contract: fewer system calls and fewer Python frames for each event.

Linux only: importing it elsewhere raises ImportError, as Twisted's epoll reactor does.

Differences from its base, `twisted.internet.epollreactor`:

- An event calls its descriptor directly instead of through `log.callWithLogger`. The log context that this function
  builds for every event is built only when code logs.
- `write_soon` calls a descriptor's doWrite before the reactor next waits, without waiting for writability.
- `exchange` replaces a descriptor by another one without a system call.
- Timers run on the monotonic clock: setting the system clock moves no deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from select import EPOLLIN
from time import monotonic
from typing import Any

from twisted.internet import error
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import installReactor
from twisted.python import log
from twisted.python.context import theContextTracker

# An empty log context, for the time in which the reactor waits: signal handlers run then, and may log.
_NO_CONTEXT: dict[Any, Any] = {}

_NO_DESCRIPTOR = error.ConnectionFdescWentAway("File descriptor lost")


class _LogContext:
    """The context that `log.callWithLogger` pushes onto the stack for a descriptor, built when it is read."""

    __slots__ = ("_selectable",)

    def __init__(self, selectable: Any) -> None:
        self._selectable = selectable

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if key is not log.ILogContext:
            raise KeyError(key)
        try:
            prefix = self._selectable.logPrefix()
        except Exception:
            prefix = "(buggy logPrefix method)"
        return {**self._outer(), "system": prefix}

    def _outer(self) -> dict[str, Any]:
        """Return the log context below this one: that of the caller of reactor.run, or Twisted's default."""
        contexts = theContextTracker.currentContext().contexts
        # In a thread that was started with this context, the whole stack is below it.
        below = contexts[: contexts.index(self)] if self in contexts else contexts
        for context in reversed(below):
            with suppress(KeyError):
                return context[log.ILogContext]  # type: ignore[no-any-return]  # the stack is untyped
        return {}


class Reactor(EPollReactor):
    """Twisted's epoll reactor with a lower cost for each event, on the monotonic clock."""

    seconds = staticmethod(monotonic)

    def __init__(self) -> None:
        self._log_contexts: dict[int, _LogContext] = {}
        self._writers_soon: list[Any] = []
        # Called with an IWriteDescriptor: its doWrite is called once before the reactor next waits, as if it were
        # writable. For a descriptor whose socket is very likely writable: this saves registering and unregistering it.
        # Call it from the reactor's thread only. A fan-out calls it for each receiver, so it has no Python frame.
        self.write_soon: Callable[[Any], None] = self._writers_soon.append
        super().__init__()

    def exchange(self, before: Any, after: Any) -> None:
        """Replace a registered descriptor by another one of the same socket. No effect if `before` is not registered.

        This saves two or four system calls. From the next event on, `after` is called.
        """
        fd = before.fileno()
        if self._selectables.get(fd) is before:
            self._selectables[fd] = after
            self._log_contexts[fd] = _LogContext(after)

    def doPoll(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds (None: no limit) for events, and handle one batch of them."""
        contexts = theContextTracker.currentContext().contexts
        depth = len(contexts)
        contexts.append(_NO_CONTEXT)  # the place for the log context of the current descriptor
        try:
            if self._writers_soon:
                self._write_now(contexts)
                contexts[-1] = _NO_CONTEXT
                timeout = 0  # the writers may have set timers, stopped the reactor, or called write_soon
            selectables = self._selectables
            log_contexts = self._log_contexts
            try:
                # Up to one event for each descriptor, so that every descriptor has its turn in every batch.
                events = self._poller.poll(-1 if timeout is None else timeout, len(selectables))
            except InterruptedError:
                return
            for fd, event in events:
                try:
                    selectable = selectables[fd]
                except KeyError:  # closed by a descriptor that was handled before it
                    continue
                contexts[-1] = log_contexts[fd]
                if event != EPOLLIN:
                    self._doReadOrWrite(selectable, fd, event)
                    continue
                # Twisted's _doReadOrWrite, inlined for the usual event.
                try:
                    why = selectable.doRead() if selectable.fileno() != -1 else _NO_DESCRIPTOR
                except BaseException as problem:
                    log.err()
                    self._disconnectSelectable(selectable, problem, False)
                else:
                    if why:
                        self._disconnectSelectable(selectable, why, True)
        finally:
            del contexts[depth:]

    doIteration = doPoll

    def _write_now(self, contexts: list[Any]) -> None:
        writers = self._writers_soon[:]
        self._writers_soon.clear()
        log_contexts = self._log_contexts
        for writer in writers:
            # Twisted's _doReadOrWrite, inlined for a fan-out to many connections.
            try:
                fd = writer.fileno()
                contexts[-1] = log_contexts.get(fd) or _LogContext(writer)
                why = writer.doWrite() if fd != -1 else _NO_DESCRIPTOR
            except BaseException as problem:
                contexts[-1] = _LogContext(writer)  # fileno() may have raised
                log.err()
                self._disconnectSelectable(writer, problem, False)
            else:
                if why:
                    self._disconnectSelectable(writer, why, False)

    def _disconnectSelectable(self, selectable: Any, why: BaseException, isRead: bool, *args: Any) -> None:
        """Disconnect as Twisted does, but log what a descriptor raises: the rest of the batch is still handled."""
        try:
            super()._disconnectSelectable(selectable, why, isRead, *args)
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.err()

    # --- registration of descriptors: Twisted's rules, with a log context for each descriptor ---

    def _add(
        self, xer: Any, primary: set[int], other: set[int], selectables: dict[int, Any], event: int, antievent: int
    ) -> None:
        fd = xer.fileno()
        if fd not in primary:
            if fd in other:
                self._poller.modify(fd, event | antievent)
            else:
                self._poller.register(fd, event)
            primary.add(fd)
            selectables[fd] = xer
            self._log_contexts[fd] = _LogContext(xer)

    def _remove(
        self, xer: Any, primary: set[int], other: set[int], selectables: dict[int, Any], event: int, antievent: int
    ) -> None:
        fd = xer.fileno()
        if fd == -1:  # already closed: search for its registration
            fd = next((known for known, selectable in selectables.items() if selectable is xer), -1)
        if fd in primary:
            if fd in other:
                self._poller.modify(fd, antievent)
            else:
                del selectables[fd], self._log_contexts[fd]
                self._poller.unregister(fd)
            primary.remove(fd)


def install() -> None:
    """Install this reactor in the process. Raises ReactorAlreadyInstalledError if there is one."""
    installReactor(Reactor())
