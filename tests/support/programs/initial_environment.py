"""Check that the initial environment is found in memory, equal to that in /proc."""

import os

from rtservice.net.activation import _initial_environment_in_memory

del os.environ["LISTEN_PID"]
os.environ["NEW"] = "x" * 10_000
with open("/proc/self/environ", "rb") as file:
    assert _initial_environment_in_memory() == file.read().split(bytes(1))
