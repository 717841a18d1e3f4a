"""The messages between supervisor and worker."""

import json
import random
import time

import pytest

from rtservice.host.control import FROM_WORKER, TO_WORKER, ControlError, Messages, encode


def messages(longest: int = 1000) -> Messages:
    return Messages(FROM_WORKER | TO_WORKER, longest)


SENT = [("start", {"a": [1, "ü\n", None]}), ("share", 3), ("drain", ["slot", "own"]), ("hurry", None), ("beat", {})]
BYTES = b"".join(encode(word, value) for word, value in SENT)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8192])
def test_messages_arrive_whole_however_they_are_split(size: int) -> None:
    receiver = messages()
    pieces = [BYTES[at : at + size] for at in range(0, len(BYTES), size)]
    assert [one for piece in pieces for one in receiver.feed(piece)] == SENT


def test_a_message_may_be_split_at_any_byte() -> None:
    for at in range(len(BYTES) + 1):
        receiver = messages()
        assert [*receiver.feed(BYTES[:at]), *receiver.feed(BYTES[at:])] == SENT


def test_a_message_is_one_line_whatever_is_in_it() -> None:
    assert encode("failed", "two\nlines\r\n").count(b"\n") == 1


def test_a_log_record_is_handed_on_as_the_text_that_it_is() -> None:
    assert list(messages().feed(b'log {"a": 1}\n')) == [("log", '{"a": 1}')]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\n", r"a message '', which is none of access, beat, "),
        (b"no\n", "a message 'no'"),
        (b"\xff\x00" * 200 + b"\n", r"a message '\\\\xff"),
        (b"beat\n", "a message 'beat' that is not JSON"),
        (b"beat {\n", "not JSON"),
        (b"beat \xff\n", "not JSON"),
        (b"log \xff\n", "not JSON"),
        (b"beat " + b"[" * 900 + b"\n", "not JSON"),
        (b"beat " + b"9" * 995, "a message of more than 999 bytes"),
        (b"beat " + b"9" * 995 + b"\n", "a message of more than 999 bytes"),
        (b"\x00" * 5000, "more than 999"),
    ],
)
def test_what_is_no_message_raises_the_error_of_its_own(data: bytes, problem: str) -> None:
    with pytest.raises(ControlError, match=problem):
        list(messages(999).feed(data))


def test_nesting_that_exhausts_the_parser_is_rubbish_like_any_other() -> None:
    with pytest.raises(ControlError, match="not JSON"):
        list(messages(1_000_000).feed(b"beat " + b"[" * 500_000 + b"\n"))


def test_the_text_of_an_error_is_short() -> None:
    with pytest.raises(ControlError) as error:
        list(messages(100_000).feed(b"x" * 90_000 + b"\n"))
    assert len(str(error.value)) < 200


def test_the_longest_message_is_taken_and_one_byte_more_is_not() -> None:
    longest = b'failed "' + b"x" * 91 + b'"'
    assert len(longest) == 100
    assert list(messages(100).feed(longest + b"\n" + longest + b"\n")) == [("failed", "x" * 91)] * 2
    with pytest.raises(ControlError):
        list(messages(99).feed(longest + b"\n"))


def test_a_line_that_does_not_end_is_refused_before_it_does() -> None:
    receiver = messages(100)
    assert list(receiver.feed(b"x" * 100)) == []
    with pytest.raises(ControlError):
        list(receiver.feed(b"x"))


def test_what_came_before_rubbish_is_heard() -> None:
    found = messages().feed(b"ready null\nrubbish\n")
    assert next(found) == ("ready", None)
    with pytest.raises(ControlError, match="rubbish"):
        next(found)


def test_each_side_takes_its_own_words_alone() -> None:
    with pytest.raises(ControlError):
        list(Messages(FROM_WORKER, 100).feed(b"drain []\n"))
    with pytest.raises(ControlError):
        list(Messages(TO_WORKER, 100).feed(b"ready null\n"))


def test_random_bytes_raise_nothing_else() -> None:
    source = random.Random(1)
    words = [
        *(word.encode() for word in FROM_WORKER),
        b" ",
        b"\n",
        b"{",
        b"}",
        b"[",
        b'"',
        b"\\u",
        b"1",
        b"\xff",
        b"\0",
    ]
    for _ in range(5000):
        data = b"".join(source.choices(words, k=source.randrange(12))) + b"\n"
        try:
            for word, value in messages().feed(data):
                assert word in FROM_WORKER
                json.dumps(value)
        except ControlError:
            pass


def test_a_very_long_message_costs_time_in_proportion() -> None:
    text = "x" * (8 << 20)
    data = encode("start", text)
    receiver = messages(16 << 20)
    began = time.process_time()
    found = [one for at in range(0, len(data), 8192) for one in receiver.feed(data[at : at + 8192])]
    # To copy what is there with each of a thousand pieces took many seconds.
    assert time.process_time() - began < 1.5
    assert found == [("start", text)]
