"""Frames: what is encoded is decoded, in any pieces, and invalid frames are rejected."""

import random
from struct import pack

import pytest

from rtservice.hub.frames import Frame, FrameDecoder, FrameError, FrameKind, encode_frame

FRAMES = [
    Frame(FrameKind.MESSAGE, 0, "room", b"hello"),
    Frame(FrameKind.MESSAGE, 0, "é" * 100, bytes(1024 * 1024)),
    Frame(FrameKind.MESSAGE, 0, "room", b""),
    Frame(FrameKind.GAP, 0, "", b""),
    Frame(FrameKind.JOIN, 2**64 - 1, "room", b"m" * 1024),
    Frame(FrameKind.LEAVE, 7, "room", b""),
    Frame(FrameKind.SYNC, 3, "", b""),
    Frame(FrameKind.CLAIM, 3, "nick", b""),
    Frame(FrameKind.BYE, 0, "", b""),
]
ENCODED = b"".join(encode_frame(*frame) for frame in FRAMES)


def test_frames_are_decoded_as_they_were_encoded() -> None:
    assert FrameDecoder().feed(ENCODED) == FRAMES


@pytest.mark.parametrize("largest", [1, 13, 14, 15, 100, 65536])
def test_frames_are_decoded_from_any_pieces(largest) -> None:
    chooser = random.Random(largest)
    data = ENCODED if largest > 100 else b"".join(encode_frame(*frame) for frame in FRAMES if len(frame.payload) < 10)
    decoder = FrameDecoder()
    found = []
    start = 0
    while start < len(data):
        size = chooser.randint(1, largest)
        found += decoder.feed(data[start : start + size])
        start += size
    assert b"".join(encode_frame(*frame) for frame in found) == data


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (pack("!IBQB", 10, 18, 0, 0), "the unknown kind 18"),
        (pack("!IBQB", 9, FrameKind.SYNC, 0, 0), "SYNC with an invalid length"),
        (pack("!IBQB", 0, FrameKind.SYNC, 0, 0), "SYNC with an invalid length"),
        (pack("!IBQB", 11, FrameKind.SYNC, 0, 0), "SYNC with an invalid length"),
        (pack("!IBQB", 11, FrameKind.SYNC, 0, 1), "SYNC with an invalid length"),
        (pack("!IBQB", 211, FrameKind.SUBSCRIBE, 0, 201), "SUBSCRIBE with an invalid length"),
        (pack("!IBQB", 12, FrameKind.MESSAGE, 0, 3), "MESSAGE with an invalid length"),
        (pack("!IBQB", 11 + 1024 * 1024, FrameKind.MESSAGE, 0, 0), "MESSAGE with an invalid length"),
        (pack("!IBQB", 2**32 - 1, FrameKind.JOIN, 0, 0), "JOIN with an invalid length"),
        (pack("!IBQB", 11, FrameKind.SUBSCRIBE, 0, 1) + b"\xff", "SUBSCRIBE whose text is not UTF-8"),
    ],
)
def test_an_invalid_frame_is_rejected(data, problem) -> None:
    with pytest.raises(FrameError, match=problem):
        FrameDecoder().feed(encode_frame(FrameKind.BYE) + data)
