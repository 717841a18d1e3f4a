"""A hostile client of a status server: `hostile_http.py ATTACK HOST PORT SEED`.

It prints the number of received responses each second, until it is killed. Each attack is a function below.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
from collections.abc import Awaitable, Callable

answers = 0

HOST = b" HTTP/1.1\r\nHost: localhost\r\n"


def request(target: bytes, headers: bytes = b"") -> bytes:
    return b"GET " + target + HOST + headers + b"\r\n"


def variants(numbers: random.Random) -> bytes:
    """Return a request for an expensive response."""
    if numbers.random() < 0.3:
        accept = numbers.choice((b"text/plain", b"application/openmetrics-text", b"x/y;q=%.3f" % numbers.random()))
        return request(b"/metrics", b"Accept: " + accept + b"\r\n")
    sort = numbers.choice((b"", b"-")) + numbers.choice((b"peer", b"listener", b"phase", b"age", b"idle", b"bytes_in"))
    offset = numbers.randrange(500)
    return request(b"/status.json?sort=%b&offset=%d&limit=%d" % (sort, offset, numbers.randrange(1, 501 - offset)))


async def keep(attack: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
    """Attack on successive connections."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(sys.argv[2], int(sys.argv[3]))
            try:
                await attack(reader, writer)
            finally:
                writer.close()
        await asyncio.sleep(0.01)


async def count(reader: asyncio.StreamReader) -> None:
    """Read responses, and count them."""
    global answers
    while data := await reader.read(1 << 16):
        answers += data.count(b"HTTP/1.1 ")


async def pipeline(numbers: random.Random, expensive: bool = True, deaf: bool = False) -> None:
    """Send batches of 1000 requests repeatedly on 20 connections, and read all responses, or none."""

    async def attack(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if deaf:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reading = None
        else:
            reading = asyncio.ensure_future(count(reader))
        try:
            while True:
                targets = [variants(numbers) if expensive else request(b"/healthz") for _ in range(1000)]
                writer.write(b"".join(targets))
                await writer.drain()
        finally:
            if reading is not None:
                reading.cancel()

    await asyncio.gather(*(keep(attack) for _ in range(20)))


async def healthz(numbers: random.Random) -> None:
    await pipeline(numbers, expensive=False)


async def deaf(numbers: random.Random) -> None:
    await pipeline(numbers, deaf=True)


async def crowd(numbers: random.Random) -> None:
    """Send the next request on each of 100 connections as soon as the response is received."""

    async def attack(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        global answers
        while True:
            writer.write(variants(numbers))
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            answers += 1

    await asyncio.gather(*(keep(attack) for _ in range(100)))


async def trickle(numbers: random.Random) -> None:
    """Send a byte each half second on 130 connections."""

    async def attack(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in request(b"/healthz", b"X: " + b"x" * 1000):
            writer.write(bytes((byte,)))
            await writer.drain()
            await asyncio.sleep(0.5)

    await asyncio.gather(*(keep(attack) for _ in range(130)))


async def silent(numbers: random.Random) -> None:
    """Keep 130 connections open without a request, or after one response."""

    async def attack(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if numbers.random() < 0.5:
            writer.write(request(b"/healthz"))
        await count(reader)

    await asyncio.gather(*(keep(attack) for _ in range(130)))


async def report() -> None:
    while True:
        print(answers, flush=True)
        await asyncio.sleep(1)


async def main() -> None:
    attack = globals()[sys.argv[1]]
    await asyncio.gather(report(), attack(random.Random(int(sys.argv[4]))))


if __name__ == "__main__":
    asyncio.run(main())
