"""An epoll reactor with Twisted's contract: fewer system calls and fewer Python frames for each event.

Linux only: importing it elsewhere raises ImportError, as Twisted's own epoll reactor does.

What differs from `twisted.internet.epollreactor`, its base:

- An event calls its descriptor directly instead of through `log.callWithLogger`. The log context that this would have
  built for every event is there all the same, but made only when somebody logs.
- `write_soon` runs a descriptor's doWrite before the reactor next waits, without asking the kernel whether it may.
- `exchange` has one descriptor in the place of another without asking the kernel.
- Timers run on the monotonic clock: setting the system's clock moves no deadline.
"""

from __future__ import annotations

from contextlib import suppress
from select import EPOLLIN, EPOLLOUT
from time import monotonic
from typing import Any

from twisted.internet import error
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import installReactor
from twisted.python import log
from twisted.python.context import theContextTracker

# A context that says nothing: signal handlers run while the reactor waits, and may log.
_NOBODY: dict[Any, Any] = {}

_NO_DESCRIPTOR = error.ConnectionFdescWentAway("File descriptor lost")


class _LogContext:
    """What `log.callWithLogger` would push onto the context stack for a descriptor, made when somebody asks for it."""

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
        """The log context below this one: that of the caller of reactor.run, or Twisted's default."""
        contexts = theContextTracker.currentContext().contexts
        # In a thread that was handed this one, all of the stack is below it.
        below = contexts[: contexts.index(self)] if self in contexts else contexts
        for context in reversed(below):
            with suppress(KeyError):
                return context[log.ILogContext]  # type: ignore[no-any-return]  # the stack is untyped
        return {}


class Reactor(EPollReactor):
    """Twisted's epoll reactor, cheaper for each event, on the monotonic clock."""

    seconds = staticmethod(monotonic)

    def __init__(self) -> None:
        self._log_contexts: dict[int, _LogContext] = {}
        self._writers_soon: list[Any] = []
        super().__init__()

    def write_soon(self, writer: Any) -> None:
        """Call the doWrite of an IWriteDescriptor once before the reactor next waits, as if the kernel had asked.

        For a descriptor whose socket will most likely take what it is given: it saves being registered, reported and
        unregistered. To be called from the reactor's thread.
        """
        self._writers_soon.append(writer)

    def exchange(self, before: Any, after: Any) -> None:
        """Have another descriptor of the same socket in the place of one, if that is registered.

        It saves two or four system calls. What happens on the socket is reported to `after` from the next event on.
        """
        fd = before.fileno()
        if self._selectables.get(fd) is before:
            self._selectables[fd] = after
            self._log_contexts[fd] = _LogContext(after)

    def doPoll(self, timeout: float | None) -> None:
        """Wait up to `timeout` seconds (None: without end) for events, and handle one batch of them."""
        contexts = theContextTracker.currentContext().contexts
        depth = len(contexts)
        contexts.append(_NOBODY)  # the place for the log context of the descriptor that is handled
        try:
            if self._writers_soon:
                self._write_now(contexts)
                contexts[-1] = _NOBODY
                timeout = 0  # what they did may have set timers, stopped the reactor, or asked for more
            selectables = self._selectables
            log_contexts = self._log_contexts
            try:
                # As many as there are descriptors, so that each has its turn in every batch.
                events = self._poller.poll(-1 if timeout is None else timeout, len(selectables))
            except InterruptedError:
                return
            for fd, event in events:
                try:
                    selectable = selectables[fd]
                except KeyError:  # closed by one that was handled before it
                    continue
                contexts[-1] = log_contexts[fd]
                if event != EPOLLIN:
                    self._doReadOrWrite(selectable, fd, event)
                    continue
                # What Twisted does in _doReadOrWrite, for the usual event.
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
        writers, self._writers_soon = self._writers_soon, []
        for writer in writers:
            contexts[-1] = _LogContext(writer)
            self._doReadOrWrite(writer, -1, EPOLLOUT)

    def _disconnectSelectable(self, selectable: Any, why: BaseException, isRead: bool, *args: Any) -> None:
        """As in Twisted; what a descriptor raises at its end is logged, and the others of the batch go on."""
        try:
            super()._disconnectSelectable(selectable, why, isRead, *args)
        except KeyboardInterrupt:
            raise
        except BaseException:
            log.err()

    # --- which descriptors are watched: Twisted's rules, with a log context for each ---

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
        if fd == -1:  # closed too early: it is known by what is registered
            fd = next((known for known, selectable in selectables.items() if selectable is xer), -1)
        if fd in primary:
            if fd in other:
                self._poller.modify(fd, antievent)
            else:
                del selectables[fd], self._log_contexts[fd]
                self._poller.unregister(fd)
            primary.remove(fd)


def install() -> None:
    """Make this the process's reactor; raises ReactorAlreadyInstalledError when it has one."""
    installReactor(Reactor())
