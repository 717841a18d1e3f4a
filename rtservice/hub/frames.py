"""The frames on a link between two workers: their encoding, and their checks.

A frame is a head of 14 bytes in network byte order, a text and a payload. The head has the number of bytes after its
first field (4 bytes), the kind (1), a number (8) and the bytes of the text in UTF-8 (1). Each kind uses a part of this.
All frames have the same head, so one decoder reads them all. The peer runs hosted code: every frame is checked.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from rtservice.hub.hub import LONGEST_MEMBER, LONGEST_MESSAGE, LONGEST_TOPIC


class FrameKind(IntEnum):
    """The kind of a frame. The comment has the fields that it uses."""

    MESSAGE = 0  # text: the topic; payload: the message
    GAP = 1  # text: the topic whose messages may be missing, or empty for all topics
    SUBSCRIBE = 2  # text: a topic that the sender wants
    UNSUBSCRIBE = 3  # text: the topic
    JOIN = 4  # number of the membership; text: the topic; payload: the member
    LEAVE = 5  # number of the membership; text: the topic
    SNAPSHOT = 6  # the end of the sender's topics and members at the start of the link
    SNAPSHOT_READ = 7  # the answer to SNAPSHOT
    SYNC = 8  # number: asks for SYNCED once all earlier frames are handled
    SYNCED = 9  # number of the SYNC
    BYE = 10  # the last frame of a process that stops
    CLAIM = 11  # number of the claim; text: the key. To the arbiter: see claims.py
    RELEASE = 12  # number of the claim; text: the key
    GRANT = 13  # number of the claim
    DENY = 14  # number of the claim
    LEAD = 15  # the sender is the arbiter now, and asks for HELD
    HELD = 16  # number and text of a claim that the sender holds
    HELD_END = 17  # the end of these


class Frame(NamedTuple):
    """A received frame."""

    kind: FrameKind
    number: int
    text: str
    payload: bytes


class FrameError(Exception):
    """The peer has sent an invalid frame. The text is one short printable line."""


_HEAD = Struct("!IBQB")
_LENGTH_FIELD = 4
_REST_OF_HEAD = _HEAD.size - _LENGTH_FIELD

_KINDS = tuple(FrameKind)
_WITH_TEXT = (
    FrameKind.MESSAGE,
    FrameKind.GAP,
    FrameKind.SUBSCRIBE,
    FrameKind.UNSUBSCRIBE,
    FrameKind.JOIN,
    FrameKind.LEAVE,
    FrameKind.CLAIM,
    FrameKind.RELEASE,
    FrameKind.HELD,
)
_LONGEST_PAYLOAD = {FrameKind.MESSAGE: LONGEST_MESSAGE, FrameKind.JOIN: LONGEST_MEMBER}
# By kind: the maximum bytes of the text, and of the payload.
_LIMITS = [(LONGEST_TOPIC if kind in _WITH_TEXT else 0, _LONGEST_PAYLOAD.get(kind, 0)) for kind in FrameKind]


def encode_frame(kind: FrameKind, number: int = 0, text: str = "", payload: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    encoded = text.encode()
    return _HEAD.pack(_REST_OF_HEAD + len(encoded) + len(payload), kind, number, len(encoded)) + encoded + payload


class FrameDecoder:
    """Decodes frames: bytes in, frames out, in linear time for any division into pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()  # an incomplete frame
        self._needed = 0  # bytes of it before it is worth decoding again

    def feed(self, data: bytes) -> list[Frame]:
        """Add received bytes, and return the complete frames. Raises FrameError, after which it must not be used."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        frames: list[Frame] = []
        start, received = 0, len(data)
        while received - start >= _HEAD.size:
            length, kind, number, text_length = _HEAD.unpack_from(data, start)
            if kind >= len(_LIMITS):
                raise FrameError(f"a frame of the unknown kind {kind}")
            longest_text, longest_payload = _LIMITS[kind]
            if text_length > longest_text or not 0 <= length - _REST_OF_HEAD - text_length <= longest_payload:
                raise FrameError(f"a frame {_KINDS[kind].name} with an invalid length")
            end = start + _LENGTH_FIELD + length
            if end > received:
                self._needed = end - start
                break
            text_start = start + _HEAD.size
            payload_start = text_start + text_length
            try:
                text = data[text_start:payload_start].decode()
            except UnicodeDecodeError:
                raise FrameError(f"a frame {_KINDS[kind].name} whose text is not UTF-8") from None
            frames.append(Frame(_KINDS[kind], number, text, data[payload_start:end]))
            start = end
        else:
            self._needed = _HEAD.size
        if start < received:
            self._buffer += data[start:] if start else data
        return frames
