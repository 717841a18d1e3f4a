"""Claims of keys between the workers of one machine: one process decides which claim holds a key.

Each process has an incarnation: a number that increases in the order in which processes join the mesh. The *arbiter* is
the live process with the lowest one. Others send CLAIM to it, and it answers GRANT or DENY. RELEASE ends a claim. Only
the arbiter knows all claims; each other process knows those that it holds.

    follower ── all lower links ended ──→ collecting ── each peer has sent HELD_END ──→ leading

**What the rest of the mesh provides.** Links are FIFO. A link ends with the process at its other end, or with its BYE,
after which that process holds nothing; never for another reason. When a link ends, everything that the process sent has
been received. Two processes of the mesh have a link with each other, or will have one: see the third rule.

**No key has two holders.** An arbiter A grants a key if no live process holds it, as far as A knows. So A must know
every claim that another arbiter granted before. It asks each peer P with LEAD when all its links to lower processes
have ended, and P answers with HELD for each claim that it holds. Until then A grants nothing. There are three cases in
which P might hold a claim that A does not learn:

1. A GRANT from an earlier arbiter is still in P's socket when P gets LEAD. Therefore P answers only when its links to
   all processes lower than A have ended. Then P has received all that they sent.
2. P is granted a claim by an earlier arbiter after it has answered. The earlier arbiter's link with P has ended, so it
   cannot send anything.
3. A is not linked with P yet, because the socket is still under way to A. Therefore a process sends no CLAIM before all
   the links that it got when it joined have exchanged their snapshots, or have ended (`begin`). After that, each lower
   process has a link with it, and each higher one joins later and waits for its own exchange.

The lowest process has nothing to wait for before `begin`: the links that it got when it joined have lower
incarnations, and have ended. A process that joins has the highest incarnation. So it never replaces a live arbiter, and
holds no claim: an arbiter that collects need not ask it.

**No request hangs.** A process keeps each request until it is answered. When its arbiter's link ends, it sends the
request again to the next one. The next arbiter may not have noticed its role yet: it queues each CLAIM until it leads.
If P dies while A waits for its answer, A waits for one answer less. If A dies, the next arbiter asks again.

**A request is granted once.** When P sends a request to A again, the earlier arbiter's link with P has ended. So P has
handled its GRANT if it was sent completely. If it was not, P does not hold the claim, and does not report it in HELD.

**Claims end.** The arbiter removes those of a process when its link ends. RELEASE follows CLAIM on the same link, so a
request that is withdrawn is released in case it was granted; a RELEASE that matches no claim is ignored. P does not
report a claim in HELD that it has released. So a RELEASE that is lost with an arbiter needs no repetition.

**Leaving.** A process that stops sends BYE, and its link has ended for the others: this case is that of a death. Two
deaths at once, or during a change, are two ends of links in any order.
"""

from __future__ import annotations

from collections.abc import Callable

from rtservice.hub.frames import Frame, FrameKind


class Claims:
    """The claims of one process, and those of all processes if it is the arbiter.

    `incarnation` is that of this process. `send` is called with an incarnation, and the kind, number and key of a frame
    to it. `answer` is called with the number of a claim and whether it is granted.
    """

    def __init__(
        self, incarnation: int, *, send: Callable[[int, FrameKind, int, str], None], answer: Callable[[int, bool], None]
    ) -> None:
        self.incarnation = incarnation
        self._send = send
        self._answer = answer
        self._peers: set[int] = set()  # live ones
        self._begun = False
        self._held: dict[int, str] = {}  # claims of this process: the key by the number
        self._requests: dict[int, str] = {}  # of this process, without an answer
        self._arbiter: int | None = None  # to which requests were sent
        self._leads: set[int] = set()  # peers whose LEAD is not answered; that of a lower one may come later
        # As arbiter: the claim of each key, the peers whose claims are not known, and requests that wait for them.
        self._claimed: dict[str, tuple[int, int]] = {}
        self._awaited: set[int] = set()
        self._queue: dict[tuple[int, int], str] = {}

    @property
    def leading(self) -> bool:
        """Whether this process is the arbiter, and has the claims of all processes."""
        return self._arbiter == self.incarnation and not self._awaited

    # --- links ---

    def add_peer(self, peer: int) -> None:
        """Add a process with which a link has begun."""
        self._peers.add(peer)

    def begin(self) -> None:
        """Begin to send requests: all links with which this process joined have exchanged snapshots, or have ended."""
        self._begun = True
        self._choose_arbiter()

    def remove_peer(self, peer: int) -> None:
        """Remove a process whose link has ended. Its claims are free."""
        self._peers.discard(peer)
        self._awaited.discard(peer)
        self._leads.discard(peer)
        for key in [key for key, (holder, _) in self._claimed.items() if holder == peer]:
            del self._claimed[key]
        for request in [request for request in self._queue if request[0] == peer]:
            del self._queue[request]
        self._answer_lead()
        self._choose_arbiter()
        self._decide()

    def _choose_arbiter(self) -> None:
        if not self._begun:
            return
        arbiter = min(self._peers | {self.incarnation})
        if arbiter == self._arbiter:
            return
        self._arbiter = arbiter
        if arbiter == self.incarnation:
            self._claimed = {key: (self.incarnation, number) for number, key in self._held.items()}
            self._awaited = set(self._peers)
            for peer in self._peers:
                self._send(peer, FrameKind.LEAD, 0, "")
            for number, key in self._requests.items():
                self._queue[self.incarnation, number] = key
            self._decide()
        else:
            for number, key in self._requests.items():
                self._send(arbiter, FrameKind.CLAIM, number, key)

    # --- this process ---

    def request(self, number: int, key: str) -> None:
        """Claim a key. `answer` is called now or later, unless `release` is called before."""
        self._requests[number] = key
        if self._arbiter == self.incarnation:
            self._queue[self.incarnation, number] = key
            self._decide()
        elif self._arbiter is not None:
            self._send(self._arbiter, FrameKind.CLAIM, number, key)

    def release(self, number: int) -> None:
        """End a claim or withdraw a request; no effect if there is none."""
        key = self._held.pop(number, None) or self._requests.pop(number, None)
        if key is None or self._arbiter is None:
            return
        if self._arbiter == self.incarnation:
            self._end(self.incarnation, number, key)
        else:
            self._send(self._arbiter, FrameKind.RELEASE, number, key)

    # --- frames ---

    def received(self, peer: int, frame: Frame) -> None:
        """Handle a frame about claims from a live peer."""
        kind, number, key, _ = frame
        if kind is FrameKind.CLAIM:
            self._queue[peer, number] = key
            self._decide()
        elif kind is FrameKind.RELEASE:
            self._end(peer, number, key)
        elif kind is FrameKind.GRANT:
            # A request that was withdrawn is not there. RELEASE was sent for it.
            granted = self._requests.pop(number, None)
            if granted is not None:
                self._held[number] = granted
                self._answer(number, True)
        elif kind is FrameKind.DENY:
            if self._requests.pop(number, None) is not None:
                self._answer(number, False)
        elif kind is FrameKind.LEAD:
            self._leads.add(peer)
            self._answer_lead()
        elif kind is FrameKind.HELD:
            self._claimed.setdefault(key, (peer, number))
        elif kind is FrameKind.HELD_END:
            self._awaited.discard(peer)
            self._decide()

    def _answer_lead(self) -> None:
        arbiter = min(self._peers, default=None)
        if arbiter in self._leads:
            self._leads.discard(arbiter)
            for number, key in self._held.items():
                self._send(arbiter, FrameKind.HELD, number, key)
            self._send(arbiter, FrameKind.HELD_END, 0, "")

    # --- the arbiter ---

    def _end(self, process: int, number: int, key: str) -> None:
        self._queue.pop((process, number), None)
        if self._claimed.get(key) == (process, number):
            del self._claimed[key]

    def _decide(self) -> None:
        """Answer the requests that wait, in their order, if this process leads. An answer may make a request."""
        while self._queue and self.leading:
            process, number = request = next(iter(self._queue))
            key = self._queue.pop(request)
            granted = key not in self._claimed
            if granted:
                self._claimed[key] = request
            if process != self.incarnation:
                self._send(process, FrameKind.GRANT if granted else FrameKind.DENY, number, "")
            elif self._requests.pop(number, None) is not None:
                if granted:
                    self._held[number] = key
                self._answer(number, granted)
