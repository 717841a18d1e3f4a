"""A factory that ends its process at the start: by the signal in FATAL, or by exit if FATAL is empty."""

import os

from twisted.internet.protocol import Factory


class Fatal(Factory):
    def startFactory(self):
        if os.environ["FATAL"]:
            os.kill(os.getpid(), int(os.environ["FATAL"]))
        os._exit(0)
