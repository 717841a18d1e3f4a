"""The timeout after which a waiting test fails."""

DEADLINE = 60  # seconds; most waits take a fraction of a second, but test machines are busy
