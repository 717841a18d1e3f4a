"""Conflicts between listeners: which of them the kernel does not bind together.

Every TCP listener is bound with SO_REUSEADDR, IPv6 ones with IPV6_V6ONLY (ipv6(7)), and with SO_REUSEPORT only after
its address was bound without. So, with and without workers, two of them conflict if they have the same port and family,
and the same address or the wildcard on either side. IPv4 and IPv6 never conflict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TCPPlace:
    """A TCP address and port.

    `six` is true for IPv6. `host` is in the text form of inet_ntop(3), or a host name that is not resolved; with
    `unsure`, it may have no address of this family. `zone` is the number of a network interface, or 0. Port 0 means a
    different port each time. `shown` is the address for messages.
    """

    is_ipv6: bool
    host: str
    port: int
    zone: int = 0
    shown: str = ""
    may_be_absent: bool = False

    def excludes(self, other: TCPPlace) -> bool:
        """Return whether the two cannot be bound together."""
        if self.port == 0 or (self.is_ipv6, self.port) != (other.is_ipv6, other.port):
            return False
        if (self.host, self.zone) == (other.host, other.zone):
            return True
        wildcard = "::" if self.is_ipv6 else "0.0.0.0"
        return wildcard in (self.host, other.host) and not (self.may_be_absent or other.may_be_absent)


@dataclass(frozen=True)
class FilePlace:
    """The file of a UNIX socket: an identity of its directory that is independent of the spelling, and its name."""

    directory: object
    name: str
    shown: str = ""

    def excludes(self, other: FilePlace) -> bool:
        """Return whether both are the same file."""
        return (self.directory, self.name) == (other.directory, other.name)


@dataclass(frozen=True)
class PassedPlace:
    """A listening socket that was passed to this process: its inode, and the place where it listens.

    Several passed sockets may share an address: the service manager has bound them.
    """

    inode: int
    where: TCPPlace | FilePlace | None
    shown: str = ""


Place = TCPPlace | FilePlace | PassedPlace


def exclude(first: Place, second: Place) -> bool:
    """Return whether two listeners cannot have these places together."""
    if isinstance(first, PassedPlace) and isinstance(second, PassedPlace):
        return first.inode == second.inode
    here = first.where if isinstance(first, PassedPlace) else first
    there = second.where if isinstance(second, PassedPlace) else second
    if isinstance(here, TCPPlace) and isinstance(there, TCPPlace):
        return here.excludes(there)
    return isinstance(here, FilePlace) and isinstance(there, FilePlace) and here.excludes(there)


def first_conflict(wanted: Iterable[tuple[str, Iterable[Place]]]) -> tuple[str, str] | None:
    """Return the first setting with a place that an earlier one has, and the error text; None without a conflict.

    `wanted` pairs each setting, as error messages name it, with its places. Places of one setting are not compared with
    each other: its listeners are opened together.
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
