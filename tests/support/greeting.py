"""The default greeting of the echo protocol."""

GREETING = b"Hello from the server!"
