"""The limits of a chat."""

from __future__ import annotations

from dataclasses import asdict, dataclass

# Bytes sent to each member in a round; at most a quarter of `max_unsent`.
_CHUNK = 16 * 1024

# Chunks in the log of a room, above which lines from other processes are skipped. While its log has one chunk or more,
# a process publishes no lines, so fewer processes than this do not cause a skip.
_LOG_CHUNKS = 16

# Upper limits: a name must fit into a member of a topic, and a line into a message of the hub. See IHub.
_MOST = {"max_line": 1_000_000, "max_name": 200}


@dataclass(frozen=True)
class ChatLimits:
    """See ChatFactory. Raises ValueError."""

    max_line: int
    max_members: int
    max_rooms: int
    max_name: int
    max_unsent: int
    max_rate: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = _MOST.get(name)
            if value < 1 or (most is not None and value > most):
                accepted = "1 or more" if most is None else f"1 to {most}"
                raise ValueError(f"{name.replace('_', '-')} is {value}; it must be {accepted}")

    @property
    def chunk(self) -> int:
        """Bytes sent to each member of a room in a round."""
        return min(_CHUNK, max(1, self.max_unsent // 4))

    @property
    def log(self) -> int:
        """Bytes in the log of a room, above which lines from other processes are skipped."""
        return _LOG_CHUNKS * self.chunk
