"""What a protocol author may import: optional interfaces, which a protocol or factory provides if it wants to."""

from zope.interface import Interface


class IDrainable(Interface):
    """A protocol that wants to say goodbye before the service ends."""

    def drain() -> None:
        """The service is about to end. Called once on each open connection, also on those that open from now on.

        The connection goes on: finish what is under way, then call the transport's `loseConnection`. What is still
        open after the service's drain timeout is closed by it, with everything written sent first.
        """
