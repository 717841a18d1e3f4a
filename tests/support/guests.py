"""Clients of tests/hosted/rooms.py that check each message they receive."""

import contextlib
import queue
import socket
import threading
from collections import defaultdict

from tests.support.deadline import DEADLINE
from tests.support.poll import poll


class GuestClient:
    """A client. A thread reads its lines.

    `expected` are publishers whose first message it must receive: those that began after it was ready.
    """

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.problems: list[str] = []
        self.seen: dict[str, int] = {}
        self.gaps = 0
        self.gap_since: dict[str, bool] = defaultdict(bool)
        self.accepted = 0
        self.lost = threading.Event()
        self.changed = threading.Condition()
        self.said = 0
        self._answers: queue.Queue[list[str]] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.name = self.answer("ready")[0]
        self.pid = int(self.name.partition(".")[0])

    def _read(self) -> None:
        with contextlib.suppress(OSError), self.socket.makefile("r", newline="\n") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break
                self._handle(line.split())
        self.lost.set()
        self._answers.put(["lost"])
        with self.changed:
            self.changed.notify_all()

    def _handle(self, words: list[str]) -> None:
        if words[0] == "said":
            name, number = words[1], int(words[2])
            last = self.seen.get(name)
            if last is None:
                last = 0
            if number <= last:
                self.problems.append(f"{number} after {last} of {name}")
            elif number > last + 1 and not self.gap_since[name] and name in self.seen:
                self.problems.append(f"{number} after {last} of {name} without a gap")
            with self.changed:
                self.seen[name] = number
                self.gap_since[name] = False
                self.changed.notify_all()
        elif words[0] == "gap":
            self.gaps += 1
            with self.changed:
                self.gap_since = defaultdict(lambda: True)
                self.changed.notify_all()
        elif words[0] == "accepted":
            self.accepted = int(words[1])
        else:
            self._answers.put(words)

    def answer(self, word: str) -> list[str]:
        """Return the arguments of the next answer. Raises ConnectionError if the connection ends."""
        words = self._answers.get(timeout=DEADLINE)
        if words[0] == "lost":
            self._answers.put(words)
            self.socket.close()
            raise ConnectionError
        assert words[0] == word, words
        return words[1:]

    def ask(self, line: str, *answers: str) -> str:
        """Send a command, and return the word of the answer."""
        self.send(line)
        words = self._answers.get(timeout=DEADLINE)
        assert words[0] in answers, words
        return words[0]

    def send(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def say(self, length: int = 0) -> None:
        self.said += 1
        self.send(f"say {self.said} {length}")

    def who(self) -> set[str]:
        self.send("who")
        return set(self.answer("here"))

    def expect(self, other: "GuestClient") -> None:
        """Expect all messages of a client that has not published yet."""
        self.seen.setdefault(other.name, 0)

    def has(self, name: str, number: int) -> bool:
        """Whether it has received this message, or a gap after the last one that it has."""
        return self.seen.get(name, 0) >= number or self.gap_since[name]

    def wait_for(self, other: "GuestClient", number: int) -> None:
        """Wait until `has` is true."""
        with self.changed:
            found = self.changed.wait_for(lambda: self.has(other.name, number) or self.lost.is_set(), DEADLINE)
            assert found, f"{self.name} has {self.seen.get(other.name)} of {number} of {other.name}"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        self.socket.close()


def guests_of(port: int, pids: list[int]) -> dict[int, GuestClient]:
    """Return a client of each worker. Other clients, which had to be made for this, are no members any more."""
    found: dict[int, GuestClient] = {}
    closed: set[str] = set()
    for _ in range(500):
        guest = GuestClient(port)
        if guest.pid in pids and guest.pid not in found:
            found[guest.pid] = guest
        else:
            guest.close()
            closed.add(guest.name)
        if found.keys() == set(pids):
            # Nothing confirms to a client that its member has left.
            poll(lambda: all(guest.who().isdisjoint(closed) for guest in found.values()))
            return found
    raise AssertionError(f"no client was accepted by some of {pids}")
