"""Names of members, rooms and nicknames on the hub, and presence: which members and rooms `/who` and `/rooms` show."""

from __future__ import annotations

from hashlib import sha256

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from rtservice.interfaces import HubUnavailable, IHub, IMembership

# The topic whose members are the rooms: each process joins once for each room in which it has members.
DIRECTORY = "chat/rooms"

# Bytes of a topic or key in UTF-8; see IHub.
_LONGEST = 200


def hub_name(kind: str, text: str) -> str:
    """Return a topic or key for a text, which is not empty. Long texts are replaced by their hash."""
    name = f"chat/{kind}/{text}"
    return name if len(name.encode()) <= _LONGEST else f"chat/{kind}-sha256/{sha256(text.encode()).hexdigest()}"


class NamePresence:
    """A name that `IHub.members` of a topic shows until `leave`."""

    def __init__(self, hub: IHub, topic: str, name: str) -> None:
        self._membership: IMembership | None = None
        # Fires with None when the name is shown everywhere, or the hub has stopped.
        self.shown: Deferred[None] = hub.join(topic, name.encode()).addCallbacks(self._joined, self._not_joined)

    def _joined(self, membership: IMembership) -> None:
        self._membership = membership

    def _not_joined(self, failure: Failure) -> None:
        failure.trap(HubUnavailable)

    def leave(self) -> None:
        """Show the name no more."""
        if self._membership is not None:
            self._membership.leave()
        else:
            self.shown.addErrback(lambda _: None)  # the CancelledError
            self.shown.cancel()
