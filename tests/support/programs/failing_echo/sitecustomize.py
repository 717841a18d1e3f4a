"""Makes the echo protocol raise an exception when it receives `fail`."""

from twisted.logger import Logger

import rtservice.protocols.echo as echo

log = Logger("rtservice.net")
received = echo.Echo.dataReceived


def failing(self, data):
    if data == b"fail":
        log.warn("a warning")
        log.error("a failure is logged")
        raise ValueError("a\nvalue\x1b")
    received(self, data)


echo.Echo.dataReceived = failing
