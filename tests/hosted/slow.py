"""A module that waits for a file `go` during its import or the creation of its logger; the file `here` names which.

The logger is created after every socket is bound, and before the service runs.
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

from rtservice.protocols.echo import EchoFactory as Slow  # noqa: E402, F401  # imported after the wait
