"""Signal handlers in a worker that block its reactor, log, crash, or send invalid messages."""

import signal
import sys

if "rtservice.pool.worker" in sys.orig_argv:

    def blocked_by_its_protocol(number, frame):
        while True:
            pass

    def dies(number, frame):
        import os

        print("these are\x1b its last words", file=sys.stderr)
        sys.stderr.write("unfinished")
        sys.stderr.flush()
        os.abort()

    def fails(number, frame):
        from twisted.logger import Logger

        try:
            raise ZeroDivisionError("division by zero")
        except ZeroDivisionError:
            Logger(namespace="some.protocol").failure("it failed for {peer}", peer="somebody", answer=42)
        Logger(namespace="some.protocol").warn("a warning with {fields}", fields=["a", 1], of=object())

    def grows(number, frame):
        global memory
        memory = bytearray(200 << 20)
        memory[::4096] = b"x" * len(memory[::4096])

    def rambles(number, frame):
        import os

        os.write(4, b"no such word\n")

    def floods(number, frame):
        from twisted.logger import Logger

        log = Logger(namespace="some.protocol")
        for count in range(50_000):
            log.info("a flood of {count}", count=count)

    for place, action in enumerate((blocked_by_its_protocol, dies, fails, grows, rambles, floods)):
        signal.signal(signal.SIGRTMIN + place, action)
