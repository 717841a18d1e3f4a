"""A nickname in the whole service: claims that exclude equal names and names that look alike."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred

from rtservice.interfaces import IClaim, IHub
from rtservice.protocols.chat.presence import hub_name
from rtservice.protocols.names import similarity_keys

_Answer = Deferred[IClaim | None]


class Nickname:
    """The claims of one member's nickname: one for each of its similarity keys."""

    def __init__(self, hub: IHub) -> None:
        self._hub = hub
        self._claims: dict[str, IClaim] = {}  # by similarity key
        self._keys: frozenset[str] = frozenset()  # of the nickname

    @property
    def held(self) -> bool:
        """Whether no other member can have the nickname."""
        return self._keys == self._claims.keys()

    async def claim(self, name: str, ask: Callable[[_Answer], _Answer], lost: Callable[[], None]) -> bool:
        """Claim a nickname, then release the one before. Return whether that succeeded; if not, nothing changes.

        To claim the same name again restores lost claims. `ask` returns the Deferred to wait for, instead of the hub's.
        `lost` is called when the hub reports that a claim is lost. Raises HubUnavailable.
        """
        keys = frozenset(similarity_keys(name))
        claimed: dict[str, IClaim] = {}
        complete = False
        try:
            # In order: of two members that claim the same keys simultaneously, one succeeds.
            for key in sorted(keys - self._claims.keys()):
                claiming = self._hub.claim(hub_name("nick", key), name.encode())
                # A claim is noted when it is granted: `ask` may be cancelled between that and its answer.
                claiming.addCallback(_note, claimed, key)
                if await ask(claiming) is None:
                    return False
            complete = True
        finally:
            if not complete:
                for claim in claimed.values():
                    claim.release()
        for key in self._claims.keys() - keys:
            self._claims.pop(key).release()
        self._keys = keys
        self._claims |= claimed
        for key, claim in claimed.items():
            claim.lost.addCallback(self._claim_lost, key, lost)
        return True

    def release(self) -> None:
        """Release the nickname."""
        for claim in self._claims.values():
            claim.release()
        self._claims.clear()

    def _claim_lost(self, result: object, key: str, lost: Callable[[], None]) -> None:
        self._claims.pop(key, None)
        lost()


def _note(claim: IClaim | None, claimed: dict[str, IClaim], key: str) -> IClaim | None:
    """Add a claim that is granted to `claimed`."""
    if claim is not None:
        claimed[key] = claim
    return claim
