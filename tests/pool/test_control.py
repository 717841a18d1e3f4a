"""The control channel: framing, bounded JSON decoding, and the messages to a worker."""

import time

import pytest

from rtservice.pool.control import (
    TO_WORKER,
    LineFraming,
    ProtocolViolation,
    SupervisorMessages,
    decode_value,
    encode,
    shown,
)

SENT = [
    ("start", {"a": [1, "ü\n", None]}),
    ("share", 3),
    ("drain", ["slot", "own"]),
    ("abort_drain", None),
    ("rows", {}),
]
BYTES = b"".join(encode(word, value) for word, value in SENT)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8192])
def test_messages_split_into_pieces_of_any_size_are_decoded(size: int) -> None:
    receiver = SupervisorMessages(1000)
    pieces = [BYTES[at : at + size] for at in range(0, len(BYTES), size)]
    assert [message for piece in pieces for message in receiver.feed(piece)] == SENT


def test_message_may_be_split_at_any_byte() -> None:
    for at in range(len(BYTES) + 1):
        receiver = SupervisorMessages(1000)
        assert [*receiver.feed(BYTES[:at]), *receiver.feed(BYTES[at:])] == SENT


def test_encoded_message_is_one_line() -> None:
    assert encode("failed", "two\nlines\r\n").count(b"\n") == 1


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\n", "an unknown message ''"),
        (b"no\n", "an unknown message 'no'"),
        (b"beat {}\n", "an unknown message 'beat'"),
        (b"\xff\x00" * 200 + b"\n", r"an unknown message '\\\\xff"),
        (b"drain\n", "a message 'drain' that is not JSON"),
        (b"drain {\n", "not JSON"),
        (b"drain \xff\n", "not JSON"),
        (b"drain " + b"[" * 900 + b"\n", "not JSON"),
        (b"share " + b"9" * 995, "a message of more than 999 bytes"),
        (b"share " + b"9" * 995 + b"\n", "a message of more than 999 bytes"),
        (b"\x00" * 5000, "more than 999"),
    ],
)
def test_invalid_message_is_a_violation_with_a_short_text(data: bytes, problem: str) -> None:
    with pytest.raises(ProtocolViolation, match=problem) as error:
        list(SupervisorMessages(999).feed(data))
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "[NaN]", "9" * 311, "-" + "9" * 310, "9" * 250_000])
def test_non_json_and_very_long_numbers_are_violations(text: str) -> None:
    with pytest.raises(ProtocolViolation, match="'share' that is not JSON"):
        decode_value("share", text.encode())


@pytest.mark.parametrize("text", [b"[" * 500_000, b'{"a":' * 200_000, b"[" * 500_000 + b"]" * 500_000])
def test_too_deep_nesting_is_a_violation(text: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="not JSON"):
        decode_value("drain", text)


def test_line_of_the_maximum_length_is_accepted_and_a_longer_one_rejected() -> None:
    framing = LineFraming(100)
    framing.feed(b"x" * 100 + b"\n" + b"y" * 100 + b"\n")
    assert [framing.next(), framing.next(), framing.next()] == [b"x" * 100, b"y" * 100, None]
    framing.feed(b"x" * 101 + b"\n")
    with pytest.raises(ProtocolViolation):
        framing.next()


def test_unterminated_line_is_rejected_at_the_maximum_length_and_its_buffer_freed() -> None:
    framing = LineFraming(100)
    framing.feed(b"x" * 100)
    assert framing.next() is None
    framing.feed(b"x")
    with pytest.raises(ProtocolViolation):
        framing.next()
    assert len(framing._buffer) == 0


def test_message_before_an_invalid_one_is_decoded() -> None:
    found = SupervisorMessages(1000).feed(b"abort_drain null\nrubbish\n")
    assert next(found) == ("abort_drain", None)
    with pytest.raises(ProtocolViolation, match="rubbish"):
        next(found)


def test_very_long_message_takes_linear_time() -> None:
    text = "x" * (8 << 20)
    data = encode("start", text)
    receiver = SupervisorMessages(16 << 20)
    began = time.process_time()
    found = [message for at in range(0, len(data), 8192) for message in receiver.feed(data[at : at + 8192])]
    # Copying the whole buffer for each of a thousand pieces took many seconds.
    assert time.process_time() - began < 1.5
    assert found == [("start", text)]


def test_many_short_messages_take_linear_time() -> None:
    receiver = SupervisorMessages(1000)
    began = time.process_time()
    assert sum(1 for _ in receiver.feed(b"abort_drain null\n" * 100_000)) == 100_000
    assert time.process_time() - began < 5


def test_received_values_are_shown_short_and_in_ascii() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown("é" * 1000) == "'" + r"\xe9" * 20 + "'"
    assert shown(deep) == "of type list"


def test_every_message_to_a_worker_is_covered() -> None:
    assert {word for word, _ in SENT} == TO_WORKER
