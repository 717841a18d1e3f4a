"""A protocol's request to start TLS."""

STARTTLS = b"STARTTLS\r\n"
