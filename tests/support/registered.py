"""Whether a reactor watches a connection, or the TLS or PROXY stage below it."""

from typing import Any

from twisted.internet import reactor


def reads(connection: Any, by: Any = reactor) -> bool:
    """Return whether a reactor reads for a connection."""
    return _is_among(connection, by.getReaders())


def is_registered(connection: Any, by: Any = reactor) -> bool:
    """Return whether a reactor reads or waits to write for a connection."""
    return _is_among(connection, by.getReaders() + by.getWriters())


def _is_among(connection: Any, descriptors: list[Any]) -> bool:
    return any(connection in (each, getattr(each, "connection", None)) for each in descriptors)
