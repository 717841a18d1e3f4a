"""Chat rooms: an example of a protocol on the hub, with bounds on all resources.

Member ──→ Turns ──→ Room.say ──→ hub ──→ Room.received (in each process) ──→ Turns ──→ Member.deliver

Work is divided so that no member can delay the others:

- An event of a connection only stores the input. Lines are handled, and sent to the members of a room, in *turns*.
- A room has one subscription in each process with members. A line is published to the room's topic, and comes back to
  all processes, the publishing one included. There it is appended to the log of the room. A *round* sends the beginning
  of the log to all members of the process. So all of them get lines in the same order, and many short lines cost one
  write for each member.
- A room with a full log accepts no line of its members until a round has made space; lines that are published and have
  not come back count, too. Meanwhile the lines wait, one of each member in rotation, and reading from a member pauses
  while more than INPUT_LIMIT bytes of its input wait. Lines from other processes are skipped while the log has
  LOG_LIMIT bytes, and a notice replaces them.
- A member's line is handled after the hub has answered for the line before. A wait for the hub ends after
  ANSWER_SECONDS with a notice.
"""

from rtservice.protocols.chat.factory import ChatFactory

__all__ = ["ChatFactory"]
