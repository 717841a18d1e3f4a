"""rtservice runs a Twisted protocol as a production TCP service."""

__version__ = "0.1.0"
