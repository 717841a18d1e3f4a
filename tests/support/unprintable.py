"""A value that cannot be sent or printed."""


class Unprintable:
    """A value that JSON cannot hold, and whose repr() fails too."""

    def __repr__(self) -> str:
        raise RuntimeError("no")
