"""The time after which a test that waits has failed."""

DEADLINE = 30  # seconds for something that takes a fraction of one; generous, since test machines are busy
