"""Makes a worker reject its settings while the file in BROKEN exists."""

import functools
import os
import sys

if "rtservice.pool.worker" in sys.orig_argv and os.path.exists(os.environ["BROKEN"]):
    from rtservice.protocols import echo

    @functools.wraps(echo.EchoFactory.__init__)  # the arguments are the options of the protocol
    def refuse(self, *arguments):
        raise ValueError("broken by design")

    echo.EchoFactory.__init__ = refuse
