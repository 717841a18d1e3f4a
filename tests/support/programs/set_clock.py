"""Set the clock of libfaketime while a timer runs on the reactor of rtservice.

Arguments: the file of the clock, and its new offset.
"""

import sys
import time
from pathlib import Path

from rtservice.net import reactor as rtservice_reactor

rtservice_reactor.install()
from twisted.internet import reactor  # noqa: E402  # after the installation

began = time.monotonic()


def fired():
    print("fired", time.monotonic() - began, flush=True)
    reactor.stop()


print("wall", time.time(), flush=True)


def set_clock():
    # libfaketime reads its file each time the clock is read.
    Path(sys.argv[1]).write_text(sys.argv[2])
    print("wall", time.time(), flush=True)


reactor.callLater(0.2, set_clock)
reactor.callLater(1, fired)
reactor.run()
