"""A module that waits for a file `go` while it is imported, or while its logger is made; `here` has which.

A logger is made when every socket is bound, and nothing of the service runs yet.
"""

import os
import pathlib
import time


def wait(where):
    pathlib.Path("here").write_text(where)
    end = time.monotonic() + 30
    while not os.path.exists("go") and time.monotonic() < end:
        time.sleep(0.01)


def logger():
    if os.environ["SLOW"] == "logger":
        wait("logger")
    return lambda event: None


if os.environ["SLOW"] == "import":
    wait("import")

from rtservice.protocols.echo import EchoFactory as Slow  # noqa: E402, F401  # what is hosted, after the wait
