"""Programs of the test environment, and the first arguments of `twistd`."""

import sys
from pathlib import Path

BIN = Path(sys.executable).parent
TWISTD = str(BIN / "twistd")

FOREGROUND = ("--nodaemon", "--pidfile=", "--logfile=-")
DAEMON = ("--pidfile=d.pid", "--logfile=d.log")
RTSERVICE = ("--nodaemon", "--pidfile=", "rtservice")
