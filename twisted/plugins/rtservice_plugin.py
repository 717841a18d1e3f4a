"""What twistd finds: modules are named as strings, so that reading this file imports nothing of rtservice."""

from twisted.application.reactors import Reactor
from twisted.application.service import ServiceMaker

rtservice = ServiceMaker(
    "rtservice",
    "rtservice.tap",
    "A real-time TCP service: greets each client and echoes what it sends.",
    "rtservice",
)

# Also for programs that are not ours: `twistd --reactor=rtservice`.
rtservice_reactor = Reactor(
    "rtservice",
    "rtservice.net.reactor",
    "epoll(7) reactor of rtservice: faster for each event, on the monotonic clock (Linux).",
)
