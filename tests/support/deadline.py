"""The time after which a test that waits has failed."""

DEADLINE = 60  # seconds; generous, since what is waited for takes a fraction of one, and test machines are busy
