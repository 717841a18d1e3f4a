"""The outbox of a link: in order, bounded, and never without a gap after dropped messages."""

import random
from collections.abc import Iterator

from rtservice.hub.frames import FrameDecoder, FrameKind, encode_frame
from rtservice.hub.outbox import Outbox


def message(topic: str, payload: bytes) -> tuple[str, bytes]:
    return topic, encode_frame(FrameKind.MESSAGE, text=topic, payload=payload)


def sent(outbox: Outbox, most: int = 10**9) -> bytes:
    """Send up to `most` bytes."""
    data = b""
    while len(data) < most and (part := bytes(outbox.next()[: most - len(data)])):
        outbox.sent(len(part))
        data += part
    return data


def contents(data: bytes) -> Iterator[str]:
    for frame in FrameDecoder().feed(data):
        yield f"{frame.kind.name} {frame.text}{frame.payload.decode()}"


def test_frames_are_sent_in_order() -> None:
    outbox = Outbox()
    outbox.add(encode_frame(FrameKind.SUBSCRIBE, text="a"))
    assert outbox.add_message(*message("a", b"1"))
    outbox.add(encode_frame(FrameKind.BYE))
    assert list(contents(sent(outbox))) == ["SUBSCRIBE a", "MESSAGE a1", "BYE "]
    assert outbox.size == 0


def test_a_message_that_does_not_fit_becomes_a_gap_when_half_is_sent() -> None:
    outbox = Outbox(100)
    assert outbox.add_message(*message("a", b"x" * 60))
    assert not outbox.add_message(*message("a", b"y" * 60))
    # It would fit, but must not arrive before the gap.
    assert not outbox.add_message(*message("a", b""))
    assert outbox.add_message(*message("b", b""))
    assert outbox.dropped == 2
    data = sent(outbox, 60)
    assert outbox.add_message(*message("a", b"z"))
    assert list(contents(data + sent(outbox))) == ["MESSAGE a" + "x" * 60, "MESSAGE b", "GAP a", "MESSAGE az"]
    assert outbox.gaps == 1


def test_other_frames_are_never_dropped() -> None:
    outbox = Outbox(10)
    for _ in range(100):
        outbox.add(encode_frame(FrameKind.SYNC, 1))
    assert not outbox.add_message(*message("a", b""))
    assert list(contents(sent(outbox))) == ["SYNC "] * 100 + ["GAP a"]


def test_too_many_topics_with_dropped_messages_become_one_gap_for_all() -> None:
    outbox = Outbox(100)
    assert outbox.add_message(*message("a", b"x" * 60))
    for number in range(1001):
        outbox.add_message(*message(f"topic {number}", b"y" * 60))
    assert not outbox.add_message(*message("other", b""))
    assert list(contents(sent(outbox))) == ["MESSAGE a" + "x" * 60, "GAP "]


def test_no_message_follows_a_dropped_one_of_its_topic_without_a_gap() -> None:
    chooser = random.Random(1)
    outbox = Outbox(500)
    data = b""
    for number in range(3000):
        outbox.add_message(*message(chooser.choice("ab"), b"%d %b" % (number, bytes(chooser.choice((0, 200))))))
        if chooser.random() < 0.5:
            data += sent(outbox, chooser.randint(1, 300))
    data += sent(outbox)
    assert outbox.dropped > 100
    frames = FrameDecoder().feed(data)
    numbers = [int(frame.payload.split()[0]) for frame in frames if frame.kind is FrameKind.MESSAGE]
    assert len(numbers) + outbox.dropped == 3000
    assert numbers == sorted(numbers)
