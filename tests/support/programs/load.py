"""A load generator that counts how the connections of its clients end.

Its argument is a JSON object of arguments for `Clients`. It answers each line on standard input with the counts so far,
as JSON; when standard input is closed, every client finishes, and the final counts are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import sys
import time
from typing import Any

GREETING = b"Hello from the server!"


class Clients:
    """Clients that each open one connection after another.

    The `short` ones send up to 4 KiB and half-close. The `long` ones send a message every 50 ms for one to two seconds,
    and half-close. All read to the end, and compare the data. `think` is the maximum pause between two connections of a
    client, in seconds. With `ca`, a file, they use TLS, and with `proxied` they send a PROXY header.

    `count` has the number of connections that ended `ok`, were `refused` or `reset`, ended before all data was received
    (`cut`), or timed out after `patience` seconds (`silent`); and the number of `lost` bytes of all expected ones.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        path: str = "",
        short: int,
        long: int,
        think: float = 0.2,
        ca: str = "",
        proxied: bool = False,
        seed: int = 0,
        patience: float = 30.0,
    ) -> None:
        self._port = port
        self._path = path
        self._proxied = proxied
        self._context = ssl.create_default_context(cafile=ca) if ca else None
        self._random = random.Random(seed)
        self._think = think
        self._patience = patience
        self._kinds = [self._short] * short + [self._long] * long
        self._stopping = asyncio.Event()
        self._latencies: list[float] = []
        self.count = dict.fromkeys(("ok", "refused", "reset", "cut", "silent", "lost"), 0)
        self.problems: list[str] = []

    async def run(self) -> None:
        await asyncio.gather(*(self._client(kind) for kind in self._kinds))

    def stop(self) -> None:
        self._stopping.set()

    def report(self) -> dict[str, Any]:
        slow = sorted(self._latencies)
        return {
            **self.count,
            "p50": slow[len(slow) // 2] if slow else 0.0,
            "p99": slow[len(slow) * 99 // 100] if slow else 0.0,
            "longest": slow[-1] if slow else 0.0,
            "problems": self.problems[:20],
        }

    async def _client(self, kind: Any) -> None:
        while not self._stopping.is_set():
            await self._connection(kind)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._random.random() * self._think)

    async def _connection(self, kind: Any) -> None:
        """Open a connection, use and close it, and count its outcome."""
        sent, received = bytearray(), bytearray()
        began = time.monotonic()
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(self._patience):
                reader, writer = await self._connect()
                received += await reader.readexactly(len(GREETING))
                self._latencies.append(time.monotonic() - began)
                await kind(reader, writer, sent, received)
                if self._context is None:
                    writer.write_eof()
                    received += await reader.read(-1)
        except (ConnectionRefusedError, FileNotFoundError):
            how = "refused"
        except (ConnectionError, ssl.SSLError):
            how = "reset"
        except asyncio.IncompleteReadError as error:
            received += error.partial
            how = "cut"
        except TimeoutError:
            how = "silent"
        else:
            how = "ok" if received == GREETING + sent else "cut"
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        self.count[how] += 1
        if writer is not None:
            self.count["lost"] += len(GREETING) + len(sent) - len(received)
        if how != "ok":
            self.problems.append(
                f"{how} after {time.monotonic() - began:.3f} s: {len(sent)} sent, {len(received)} received"
            )

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._path:
            reader, writer = await asyncio.open_unix_connection(self._path)
        else:
            plain = None if self._proxied else self._context
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, ssl=plain)
        if self._proxied:
            writer.write(b"PROXY TCP4 192.0.2.1 192.0.2.2 4711 80\r\n")
            if self._context is not None:
                await writer.start_tls(self._context, server_hostname="localhost")
        return reader, writer

    async def _short(self, reader: Any, writer: Any, sent: bytearray, received: bytearray) -> None:
        await self._exchange(self._random.randbytes(self._random.randrange(1, 4096)), reader, writer, sent, received)

    async def _long(self, reader: Any, writer: Any, sent: bytearray, received: bytearray) -> None:
        end = time.monotonic() + 1 + self._random.random()
        while time.monotonic() < end and not self._stopping.is_set():
            await self._exchange(self._random.randbytes(64), reader, writer, sent, received)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 0.05)

    async def _exchange(self, data: bytes, reader: Any, writer: Any, sent: bytearray, received: bytearray) -> None:
        sent += data
        writer.write(data)
        received += await reader.readexactly(len(data))


async def _main() -> None:
    clients = Clients(**json.loads(sys.argv[1]))
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    running = asyncio.create_task(clients.run())
    while await commands.readline():
        print(json.dumps(clients.report()), flush=True)
    clients.stop()
    await running
    print(json.dumps(clients.report()), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
