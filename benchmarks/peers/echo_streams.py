"""An asyncio streams echo. Usage: ``python -m benchmarks.peers.echo_streams PORT [KEY CERTIFICATE]``."""

import asyncio
import sys

from benchmarks.peers.echo_asyncio import GREETING, tls_context


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one client."""
    try:
        writer.write(GREETING)
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def main() -> None:
    """Serve until killed."""
    context = tls_context(sys.argv[2:])
    server = await asyncio.start_server(echo, "127.0.0.1", int(sys.argv[1]), ssl=context, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
