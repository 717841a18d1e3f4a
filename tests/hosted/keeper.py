"""A protocol that sends its options, including a secret, to each client."""

import json
import os

from twisted.internet.protocol import Factory, Protocol

from rtservice.interfaces import Secret


class Tell(Protocol):
    def connectionMade(self):
        given = self.factory.given
        self.transport.write(json.dumps({**given, "pid": os.getpid()}).encode() + b"\n")
        self.transport.loseConnection()


class Keeper(Factory):
    protocol = Tell

    def __init__(self, password: Secret, text: str = "", raw: bytes = b"", number: int = 0):
        print("made with", password, flush=True)
        self.given = {"password": password.reveal(), "text": text, "raw": raw.decode("latin-1")}
        self.given["environment"] = sorted(name for name in os.environ if name.startswith("RTSERVICE"))


def fails(password: str = "", path: str = ""):
    raise ValueError(f"cannot log in with {password}")
