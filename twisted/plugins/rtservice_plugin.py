"""What twistd finds: modules are named as strings, so that reading this file imports nothing of rtservice."""

from twisted.application.service import ServiceMaker

rtservice = ServiceMaker(
    "rtservice",
    "rtservice.tap",
    "A real-time TCP service: greets each client and echoes what it sends.",
    "rtservice",
)
