"""A protocol that runs another program for each message."""

import subprocess

from twisted.internet.protocol import Protocol


class Forks(Protocol):
    def dataReceived(self, data):
        ended = subprocess.run(["sh", "-c", "true & true & exit 7"], check=False)
        self.transport.write(b"%d" % ended.returncode)
