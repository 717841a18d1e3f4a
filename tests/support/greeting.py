"""The greeting of the echo protocol, as it is by default."""

GREETING = b"Hello from the server!"
