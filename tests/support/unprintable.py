"""A value that cannot be sent or printed."""


class Unprintable:
    """A value that JSON cannot encode, and whose repr() fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no")
