"""What a process has to send to one other process: bounded, and dropped messages become gaps."""

from __future__ import annotations

from rtservice.hub.frames import FrameKind, encode_frame

# The maximum unsent bytes with which a message is accepted. Gaps are sent when half of this is sent.
MOST_UNSENT = 4 * 1024 * 1024

# The maximum unsent bytes with frames other than messages. With more, the peer counts as one that does not read.
MOST_CONTROL = 64 * 1024 * 1024

# The maximum number of topics with a gap. With more, all topics get one.
_MOST_GAPS = 1000

# The maximum bytes of one send: a turn of the reactor does a bounded amount of work.
_PORTION = 256 * 1024


class Outbox:
    """The frames that wait for one peer, in order.

    A message that does not fit is dropped, and so are later ones of its topic until the GAP of the topic is added,
    which happens when half of `most_unsent` bytes are free. Other frames are never dropped.
    """

    def __init__(self, most_unsent: int = MOST_UNSENT) -> None:
        self.size = 0  # unsent bytes
        self.dropped = 0  # messages
        self.gaps = 0  # GAP frames
        self._most = most_unsent
        self._frames: list[bytes] = []  # not yet joined
        self._joined = memoryview(b"")  # what is being sent
        self._topics: set[str] = set()  # those with dropped messages
        self._all_topics = False  # there were too many

    def add(self, frame: bytes) -> None:
        """Add a frame other than a message."""
        self._frames.append(frame)
        self.size += len(frame)

    def add_message(self, topic: str, frame: bytes) -> bool:
        """Add a message of a topic, unless there are too many. Return whether it was added."""
        size = self.size + len(frame)
        if size > self._most or self._all_topics or topic in self._topics:
            self._drop(topic)
            return False
        self.size = size
        self._frames.append(frame)
        return True

    def _drop(self, topic: str) -> None:
        self.dropped += 1
        if not self._all_topics:
            self._topics.add(topic)
            self._all_topics = len(self._topics) > _MOST_GAPS

    def add_gaps(self) -> None:
        """Add the GAP of each topic with dropped messages."""
        if self._topics:
            topics = [""] if self._all_topics else list(self._topics)
            self._topics.clear()
            self._all_topics = False
            self.gaps += len(topics)
            for topic in topics:
                self.add(encode_frame(FrameKind.GAP, text=topic))

    def next(self) -> memoryview:
        """Return the next bytes to send; empty if there are none."""
        if not self._joined and self._frames:
            self._joined = memoryview(b"".join(self._frames))
            self._frames.clear()
        return self._joined[:_PORTION]

    def sent(self, count: int) -> None:
        """Remove `count` bytes, which were sent."""
        self._joined = self._joined[count:]
        self.size -= count
        if self._topics and self.size <= self._most // 2:
            self.add_gaps()

    def clear(self) -> None:
        """Remove everything."""
        self._frames.clear()
        self._joined = memoryview(b"")
        self._topics.clear()
        self._all_topics = False
        self.size = 0
