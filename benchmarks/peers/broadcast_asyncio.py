"""A broadcaster on asyncio, over Redis Pub/Sub with redis-py if its port is given.

Each line of a client is sent to all clients of all processes. Usage: ``python -m benchmarks.peers.broadcast_asyncio
PORT [REDIS_PORT]``.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import cast

CHANNEL = b"all"


class Broadcast(asyncio.Protocol):
    """One client."""

    clients: set[asyncio.Transport] = set()

    def __init__(self, publish: Callable[[bytes], object]) -> None:
        self.publish = publish
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.clients.add(self.transport)
        self.transport.write(b"Hello from the server!")

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.publish(line + b"\n")

    def connection_lost(self, problem: Exception | None) -> None:
        self.clients.discard(self.transport)


def send_to_all(line: bytes) -> None:
    """Send a line to all clients of this process."""
    for transport in Broadcast.clients:
        transport.write(line)


async def connect_redis(port: int) -> tuple[Callable[[bytes], object], list["asyncio.Task[None]"]]:
    """Subscribe, and return a function that publishes a line, and the tasks that must run."""
    from redis.asyncio import Redis  # type: ignore[import-not-found,unused-ignore]

    redis = Redis(port=port)
    subscriber = redis.pubsub(ignore_subscribe_messages=False)
    await subscriber.subscribe(CHANNEL)
    while (await subscriber.get_message(timeout=None) or {}).get("type") != "subscribe":
        pass
    lines: asyncio.Queue[bytes] = asyncio.Queue()

    async def publish() -> None:
        while True:  # one at a time, in order
            await redis.publish(CHANNEL, await lines.get())

    async def receive() -> None:
        async for message in subscriber.listen():
            if message["type"] == "message":
                send_to_all(message["data"])

    return lines.put_nowait, [asyncio.create_task(publish()), asyncio.create_task(receive())]


async def main() -> None:
    """Serve until killed."""
    port, *redis_port = map(int, sys.argv[1:])
    publish: Callable[[bytes], object] = send_to_all
    tasks: list[asyncio.Task[None]] = []
    if redis_port:
        publish, tasks = await connect_redis(redis_port[0])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Broadcast(publish), "127.0.0.1", port, backlog=1024)
    await asyncio.gather(server.serve_forever(), *tasks)


if __name__ == "__main__":
    asyncio.run(main())
