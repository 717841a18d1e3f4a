"""Sets the clock of libfaketime while a timer of our reactor runs: the clock's file, and its new offset."""

import sys
import time
from pathlib import Path

from rtservice.net import reactor as ours

ours.install()
from twisted.internet import reactor  # noqa: E402  # after the installation

began = time.monotonic()


def fired():
    print("fired", time.monotonic() - began, flush=True)
    reactor.stop()


print("wall", time.time(), flush=True)


def set_clock():
    # libfaketime reads its file again for each look at the clock.
    Path(sys.argv[1]).write_text(sys.argv[2])
    print("wall", time.time(), flush=True)


reactor.callLater(0.2, set_clock)
reactor.callLater(1, fired)
reactor.run()
