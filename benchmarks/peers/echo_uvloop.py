"""The asyncio ``Protocol`` echo on uvloop.

Usage: ``python -m benchmarks.peers.echo_uvloop PORT [KEY CERTIFICATE]``.
"""

import uvloop  # type: ignore[import-not-found,unused-ignore]

from benchmarks.peers.echo_asyncio import main

if __name__ == "__main__":
    main(uvloop.new_event_loop)
