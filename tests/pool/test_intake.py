"""Input from a worker is taken in portions: per turn, per beat, and at its end."""

from dataclasses import dataclass
from typing import Any

import pytest
from twisted.internet.task import Clock

from rtservice.pool.intake import Intake
from rtservice.pool.printed import LONGEST_PRINTED, PrintedLines


@dataclass
class Item:
    value: int
    cost: int = 1


class Bytes:
    """Decodes each byte as an item whose cost is the value of the byte; 0 is an error."""

    def __init__(self) -> None:
        self.left = bytearray()

    def feed(self, data: bytes) -> None:
        self.left += data

    def next(self) -> Item | None:
        if not self.left:
            return None
        value = self.left.pop(0)
        if not value:
            raise ValueError("zero")
        return Item(value, value)


class World:
    """An intake with limits of 10 units per turn and 25 per beat, and a record of its actions."""

    def __init__(self) -> None:
        self.turns: list[Any] = []
        self.clock = self
        self.decoder = Bytes()
        self.taken: list[int] = []
        self.problems: list[Exception] = []
        self.reads = True
        self.done = 0
        self.intake = Intake(
            self,
            self.decoder,
            take=self.take,
            fail=self.problems.append,
            pause=lambda: setattr(self, "reads", False),
            resume=lambda: setattr(self, "reads", True),
            a_turn=10,
            a_beat=25,
        )

    def take(self, item: Item) -> None:
        if item.value == 7:
            raise LookupError("seven")
        self.taken.append(item.value)

    def callLater(self, seconds: float, function: Any) -> Any:
        assert seconds == 0
        self.turns.append(function)
        return self

    def cancel(self) -> None:
        self.turns.clear()

    def finished(self) -> None:
        self.done += 1

    def turn(self) -> None:
        """One turn of the reactor."""
        turns, self.turns = self.turns, []
        for function in turns:
            function()


def test_input_below_the_limit_of_a_turn_is_taken_at_once() -> None:
    world = World()
    world.intake.feed(bytes([1, 2, 3]))
    assert world.taken == [1, 2, 3]
    assert world.reads
    assert not world.turns


def test_each_turn_takes_a_portion_and_reading_is_paused_until_all_is_taken() -> None:
    world = World()
    world.intake.feed(bytes([1] * 15))
    assert len(world.taken) == 10
    assert not world.reads
    world.turn()
    assert len(world.taken) == 15
    assert world.reads
    assert not world.turns


def test_input_over_the_limit_of_a_beat_continues_with_the_next_beat() -> None:
    world = World()
    world.intake.feed(bytes([1] * 60))
    for _ in range(10):
        world.turn()
    assert len(world.taken) == 25
    assert not world.reads
    world.intake.beat()
    for _ in range(10):
        world.turn()
    assert len(world.taken) == 50
    world.intake.beat()
    world.turn()
    assert len(world.taken) == 60
    assert world.reads


def test_beat_between_turns_schedules_no_second_turn() -> None:
    world = World()
    world.intake.feed(bytes([1] * 100))
    world.intake.beat()
    assert len(world.turns) == 1
    assert len(world.taken) == 10


def test_item_that_costs_more_than_a_turn_is_taken_alone() -> None:
    world = World()
    world.intake.feed(bytes([20, 20, 1]))
    assert world.taken == [20]
    world.turn()
    assert world.taken == [20, 20]  # 5 units of the beat were left
    world.turn()
    assert world.taken == [20, 20]
    world.intake.beat()
    assert world.taken == [20, 20, 1]


@pytest.mark.parametrize(("mistake", "kind"), [(0, ValueError), (7, LookupError)])
@pytest.mark.parametrize("before", [0, 15])
def test_nothing_is_taken_after_an_error(mistake, kind, before) -> None:
    world = World()
    world.intake.feed(bytes([1] * before + [mistake, 1, mistake]))
    world.turn()
    world.turn()
    world.intake.feed(bytes([1, mistake]))
    world.intake.beat()
    assert [type(problem) for problem in world.problems] == [kind]
    assert len(world.taken) == before
    assert not world.turns
    world.intake.finish(world.finished)
    assert world.done == 1


def test_finish_takes_the_rest_over_turns_without_the_limit_of_a_beat() -> None:
    world = World()
    world.intake.feed(bytes([1] * 55))
    world.intake.finish(world.finished)
    for count in (20, 30, 40, 50):
        world.turn()
        assert len(world.taken) == count
        assert not world.done
    world.turn()
    assert (len(world.taken), world.done) == (55, 1)
    assert not world.turns


def test_finish_resumes_an_intake_that_has_used_up_its_beat() -> None:
    world = World()
    world.intake.feed(bytes([1] * 40))
    world.turn()
    world.turn()
    world.turn()
    assert (len(world.taken), len(world.turns)) == (25, 0)
    world.intake.finish(world.finished)
    assert (len(world.taken), world.done) == (35, 0)
    world.turn()
    assert len(world.taken) == 40
    assert world.done == 1


def test_error_while_finishing_finishes_the_intake() -> None:
    world = World()
    world.intake.feed(bytes([1] * 15 + [0, 1]))
    world.intake.finish(world.finished)
    world.turn()
    assert (len(world.problems), world.done) == (1, 1)


def test_closed_intake_takes_nothing() -> None:
    world = World()
    world.intake.feed(bytes([1] * 15))
    world.intake.close()
    world.turn()
    world.intake.beat()
    world.intake.feed(bytes([1]))
    assert len(world.taken) == 10
    world.intake.finish(world.finished)
    assert world.done == 1


def test_intakes_alternate() -> None:
    clock = Clock()
    order: list[str] = []
    for name in ("a", "b"):
        lines = PrintedLines()
        intake = Intake(
            clock,
            lines,
            take=lambda line, name=name: order.append(name),
            fail=pytest.fail,
            pause=lambda: None,
            resume=lambda: None,
            a_turn=2,
        )
        intake.feed(b"\n" * 4)
    clock.advance(0)
    assert order == ["a", "a", "b", "b", "a", "a", "b", "b"]


# --- printed lines ---


def lines(*pieces: bytes, end: bool = False) -> list[str]:
    made = PrintedLines()
    found = []
    for place, piece in enumerate(pieces):
        made.feed(piece)
        if end and place == len(pieces) - 1:
            made.end()
        while (line := made.next()) is not None:
            assert line.cost >= 1
            found.append(line.text)
    return found


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ([b"one\ntwo\n"], ["one", "two"]),
        ([b"on", b"e\nt", b"wo\n"], ["one", "two"]),
        ([b"\n\n"], ["", ""]),
        ([b"\x1b[31m\x00\xff\r\n"], [r"\x1b[31m\x00\xff\r"]),
        (["ü日本\u202e\n".encode()], [r"ü日本\u202e"]),
        (["ü日本\n".encode()], ["ü日本"]),
        ([b"x" * 8192 + b"\n"], ["x" * 8192]),
        ([b"x" * 8193 + b"\n"], ["x" * 8192, "x"]),
        ([b"x" * 20_000], ["x" * 8192, "x" * 8192]),
        ([b"x" * 8192, b"\n"], ["x" * 8192]),
    ],
)
def test_output_is_split_into_lines_of_bounded_length(pieces, found) -> None:
    assert lines(*pieces) == found


def test_unterminated_line_is_returned_at_the_end_of_output() -> None:
    assert lines(b"one\ntw", b"o") == ["one"]
    assert lines(b"one\ntw", b"o", end=True) == ["one", "two"]
    assert lines(b"one\n", end=True) == ["one"]


def test_output_without_line_ends_takes_bounded_memory() -> None:
    made = PrintedLines()
    taken = 0
    for _ in range(200):
        made.feed(b"\x00" * 8192)
        while (line := made.next()) is not None:
            taken += 1
            assert len(line.text) == 4 * LONGEST_PRINTED
            assert line.cost > 300
        assert len(made._buffer) <= LONGEST_PRINTED
    assert taken == 199
