"""A setting that only a worker finds to be wrong, while the file in BROKEN is there."""

import functools
import os
import sys

if "rtservice.pool.worker" in sys.orig_argv and os.path.exists(os.environ["BROKEN"]):
    from rtservice.protocols import echo

    @functools.wraps(echo.EchoFactory.__init__)  # whose arguments are the options of the protocol
    def refuse(self, *arguments):
        raise ValueError("broken by design")

    echo.EchoFactory.__init__ = refuse
