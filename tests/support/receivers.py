"""Receivers of the hub that record what they get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zope.interface import implementer

from rtservice.interfaces import IReceiver

GAP = "gap"


@implementer(IReceiver)
class Recorder:
    """Appends each message, and GAP for a gap, to `got`. `then` is called after each."""

    def __init__(self, then: Callable[[Any], object] = lambda item: None) -> None:
        self.got: list[Any] = []
        self.then = then

    def received(self, topic: str, message: bytes) -> None:
        self.got.append(message)
        self.then(message)

    def gap(self, topic: str) -> None:
        self.got.append(GAP)
        self.then(GAP)
