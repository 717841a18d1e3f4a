"""A listener that records operations on the sockets of its slots."""

from collections.abc import Sequence

from rtservice.net.description import ListenError
from rtservice.net.tls import fingerprint


class Slots:
    """A listener that records operations on its sockets in `done`."""

    name = "tcp:127.0.0.1:1"
    shared = False
    certificates = ()
    revocation = None
    warnings = ()

    def __init__(self, slots: int, files: tuple[str, ...] = ()) -> None:
        self.slot_sockets = slots
        self.files = files
        self.initial_fingerprint = fingerprint(files)
        self.done: list[str] = []
        self.problem: ListenError | None = None

    def tls_files(self) -> tuple[str, ...]:
        return self.files

    def of_slot(self, slot: int) -> "Slots":
        assert slot < self.slot_sockets
        assert "close" not in self.done
        self.asked = slot
        return self

    def fileno(self) -> int:
        return 100 + self.asked

    def add_slot(self) -> None:
        if self.problem is not None:
            raise self.problem
        self.slot_sockets += 1
        self.done.append("add")

    def balance_over(self, slots: Sequence[int]) -> None:
        if list(slots) == list(range(self.slot_sockets - 1)):
            self.done.append("leave out")
        elif len(slots) < self.slot_sockets:
            self.done.append(f"spread over {list(slots)}")

    def remove_slot(self) -> None:
        self.slot_sockets -= 1
        self.done.append("drop")

    def remove_file(self) -> None:
        self.done.append("remove file")

    def close(self) -> None:
        self.done.append("close")
