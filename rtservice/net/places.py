"""Conflicts between listeners: which of them cannot be bound together, as the kernel decides it.

Every TCP listener is bound with SO_REUSEADDR, IPv6 ones with IPV6_V6ONLY (ipv6(7)), and with SO_REUSEPORT only after
its address was had without. So, with and without workers, two of them exclude each other when they have one port and
one family, and one address or the wildcard on either side; IPv4 and IPv6 never do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TCPPlace:
    """An address of the family `six` or not, in the text form of inet_ntop(3), or a host name that is not looked up.

    `zone` is the number of a network interface, 0 without one. Port 0 is another port each time. A name that is
    `unsure` may have no address of this family.
    """

    six: bool
    host: str
    port: int
    zone: int = 0
    shown: str = ""
    unsure: bool = False

    def excludes(self, other: TCPPlace) -> bool:
        """Whether the two cannot be listened on at once."""
        if self.port == 0 or (self.six, self.port) != (other.six, other.port):
            return False
        if (self.host, self.zone) == (other.host, other.zone):
            return True
        wildcard = "::" if self.six else "0.0.0.0"
        return wildcard in (self.host, other.host) and not (self.unsure or other.unsure)


@dataclass(frozen=True)
class FilePlace:
    """The file of a UNIX socket: what stands for its directory, however it is written, and its name there."""

    directory: object
    name: str
    shown: str = ""

    def excludes(self, other: FilePlace) -> bool:
        """Whether it is one file."""
        return (self.directory, self.name) == (other.directory, other.name)


@dataclass(frozen=True)
class PassedPlace:
    """A listening socket that was passed to this process, by its inode, and where it listens.

    Several passed sockets may share an address, as the service manager was told.
    """

    inode: int
    where: TCPPlace | FilePlace | None
    shown: str = ""


Place = TCPPlace | FilePlace | PassedPlace


def exclude(one: Place, other: Place) -> bool:
    """Whether two listeners cannot be at these places at once."""
    if isinstance(one, PassedPlace) and isinstance(other, PassedPlace):
        return one.inode == other.inode
    first = one.where if isinstance(one, PassedPlace) else one
    second = other.where if isinstance(other, PassedPlace) else other
    if isinstance(first, TCPPlace) and isinstance(second, TCPPlace):
        return first.excludes(second)
    return isinstance(first, FilePlace) and isinstance(second, FilePlace) and first.excludes(second)


def first_conflict(wanted: Iterable[tuple[str, Iterable[Place]]]) -> tuple[str, str] | None:
    """The first setting that wants a place which an earlier one takes, and what is wrong with it; None if all is well.

    `wanted` are settings, as errors begin, with the places of each. Places of one setting are not compared: what it
    stands for is opened together.
    """
    taken: list[tuple[str, Place]] = []
    for setting, places in wanted:
        places = list(places)
        for place in places:
            for other, earlier in taken:
                if exclude(place, earlier):
                    by = f"{other} ({earlier.shown})" if earlier.shown != place.shown else other
                    return setting, f"{place.shown} is taken by {by}; change or remove one of the two"
        taken += [(setting, place) for place in places]
    return None
