"""An asyncio ``Protocol`` echo. Usage: ``python -m benchmarks.peers.echo_asyncio PORT [KEY CERTIFICATE]``."""

import asyncio
import ssl
import sys
from collections.abc import Callable
from typing import cast

GREETING = b"Hello from the server!"


class Echo(asyncio.Protocol):
    """Echoes, with back-pressure: pauses reading while the client does not read."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are not a subclass
        self.transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


def tls_context(arguments: list[str]) -> ssl.SSLContext | None:
    """Return the context of the server if the command line has a key and a certificate."""
    if not arguments:
        return None
    key, certificate = arguments
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def main(loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    """Serve until killed, on asyncio's loop or on one from ``loop_factory``."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(
            Echo, "127.0.0.1", int(sys.argv[1]), ssl=tls_context(sys.argv[2:]), backlog=1024
        )
        await server.serve_forever()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
