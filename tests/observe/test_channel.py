"""An HTTP connection: limits of size, timeouts, and the number of responses per reactor turn."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web import http

from rtservice.observe.channel import DEADLINES, MAX_HEAD, MAX_LINES, Channel, ChannelState, Turns

ANSWERS = 4  # per turn

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class TurnClock(Clock):
    """A reactor clock: a call that is scheduled during a turn runs in the next turn at the earliest."""

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            for call in [call for call in self.calls if call.getTime() <= self.seconds()]:
                if call.active():
                    self.calls.remove(call)
                    call.called = True
                    call.func(*call.args, **call.kw)


class Transport(StringTransport):
    """A transport that records whether the connection was aborted."""

    aborted = False

    def abortConnection(self) -> None:
        self.aborted = True


class Request(http.Request):
    """A request that `process` of the factory answers, immediately or later."""

    channel: Any

    def process(self) -> None:
        self.channel.factory.process(self)

    def answer(self, body: bytes = b"x") -> None:
        self.setHeader("Content-Length", str(len(body)))
        self.write(body)
        self.finish()


class World:
    """Channels on a clock."""

    def __init__(self) -> None:
        self.clock = TurnClock()
        self.turns = Turns(self.clock)
        self.reported: list[BaseException | None] = []
        self.process: Any = Request.answer
        self.report = self.reported.append

    def log(self, request: Any) -> None:
        pass

    def connect(self) -> tuple[Channel, Transport]:
        channel, transport = Channel(Request), Transport()
        channel.factory = self
        channel.makeConnection(transport)
        return channel, transport


@pytest.fixture
def world(monkeypatch) -> World:
    """Channels with a turn that is limited by the number of responses, not by time."""
    monkeypatch.setattr("rtservice.observe.channel.ANSWERS_PER_TURN", ANSWERS)
    monkeypatch.setattr("rtservice.observe.channel.TURN", 1000.0)
    return World()


def statuses(transport: StringTransport) -> list[int]:
    """Return the status code of each response."""
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d+) ", transport.value())]


# --- one request at a time ---


def test_pipelined_requests_are_answered_in_order_one_per_reactor_turn(world) -> None:
    paths = []

    def process(request: Request) -> None:
        paths.append(request.uri)
        request.answer()

    world.process = process
    channel, transport = world.connect()
    channel.dataReceived(b"".join(b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % n for n in range(50)))
    assert len(paths) == 1
    assert transport.producerState == "paused"
    for count in range(2, 51):
        world.clock.turn()
        assert len(paths) == count
    assert paths == [b"/%d" % n for n in range(50)]
    assert transport.producerState == "producing"
    assert channel.idle


def test_responses_of_all_connections_are_limited_per_reactor_turn(world) -> None:
    served: list[Any] = []

    def process(request: Request) -> None:
        served.append(request.channel)
        request.answer()

    world.process = process
    channels = [world.connect()[0] for _ in range(20)]
    for channel in channels:
        channel.dataReceived(GET * 3)
    assert len(served) == ANSWERS
    while len(served) < 60:
        before = len(served)
        world.clock.turn()
        assert 0 < len(served) - before <= ANSWERS
    # Connections that wait for their first response get all but one of the responses of a turn.
    assert set(served[: 20 + 20 // (ANSWERS - 1)]) == set(channels)


def test_reading_is_paused_while_a_request_is_processed(world) -> None:
    waiting: list[Request] = []
    world.process = waiting.append
    channel, transport = world.connect()
    channel.dataReceived(GET * 2)
    assert transport.producerState == "paused"
    world.clock.turn(10)
    assert len(waiting) == 1
    waiting[0].answer()
    assert transport.producerState == "paused"  # the next request has arrived
    world.clock.turn()
    waiting[1].answer()
    assert transport.producerState == "producing"
    assert statuses(transport) == [200, 200]


def test_unsent_output_pauses_reading_and_responding(world) -> None:
    def process(request: Request) -> None:
        request.channel.pauseProducing()  # as a transport does when its buffer is full
        request.answer()

    world.process = process
    channel, transport = world.connect()
    channel.dataReceived(GET * 3)
    world.clock.turn(10)
    assert statuses(transport) == [200]
    assert transport.producerState == "paused"
    channel.resumeProducing()
    world.clock.turn(10)
    assert statuses(transport) == [200, 200]
    channel.resumeProducing()
    world.clock.turn(10)
    assert statuses(transport) == [200] * 3
    assert not channel.idle
    channel.resumeProducing()
    assert channel.idle
    assert transport.producerState == "producing"


def test_no_response_is_started_after_the_time_limit_of_a_turn(world, monkeypatch) -> None:
    monkeypatch.setattr("rtservice.observe.channel.TURN", 1e-9)  # every response exceeds it
    channels = [world.connect() for _ in range(10)]
    for channel, _ in channels:
        channel.dataReceived(GET)
    for count in range(1, 11):
        assert sum(len(statuses(transport)) for _, transport in channels) == count
        world.clock.turn()


def test_a_health_probe_does_not_wait_for_pipelined_requests_of_other_connections(world) -> None:
    crowd = [world.connect()[0] for _ in range(100)]
    for channel in crowd:
        channel.dataReceived(GET * 500)
    world.clock.turn(100)
    _, transport = probe = world.connect()
    probe[0].dataReceived(GET)
    world.clock.turn()
    assert statuses(transport) == [200]
    world.clock.advance(1)  # after a while it has the priority of a new connection again
    probe[0].dataReceived(GET)
    world.clock.turn()
    assert statuses(transport) == [200, 200]


def test_queued_requests_of_a_closed_connection_are_discarded(world) -> None:
    channel, transport = world.connect()
    channel.dataReceived(GET * 2)
    channel.connectionLost(Failure(ConnectionDone()))
    world.clock.turn(10)
    assert statuses(transport) == [200]
    assert world.reported == []
    assert world.clock.getDelayedCalls() == []


# --- size limits ---


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"x" * MAX_HEAD, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * MAX_LINES + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b" \r\n" * MAX_LINES + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\nHost: localhost\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\0b\r\n\r\n", 400),
    ],
)
def test_an_oversized_or_malformed_request_is_rejected_and_the_connection_closed(
    world, data: bytes, status: int
) -> None:
    channel, transport = world.connect()
    channel.dataReceived(data)
    channel.dataReceived(GET)
    world.clock.turn(5)
    assert statuses(transport) == [status]
    assert transport.disconnecting
    assert world.reported == []


def test_expect_100_continue_is_accepted_without_a_body(world) -> None:
    channel, transport = world.connect()
    channel.dataReceived(b"GET / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n")
    assert statuses(transport) == [200]


def test_the_largest_allowed_head_may_arrive_in_pieces_of_any_size(world) -> None:
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "
    head += b"x" * (MAX_HEAD - len(head) - 4) + b"\r\n\r\n"
    for size in (1, 7, MAX_HEAD):
        channel, transport = world.connect()
        for start in range(0, len(head), size):
            channel.dataReceived(head[start : start + size])
        world.clock.turn()
        assert statuses(transport) == [200]


# --- timeouts ---


def test_a_slowly_sent_request_times_out_with_408(world) -> None:
    channel, transport = world.connect()
    for byte in GET[:9]:
        channel.dataReceived(bytes((byte,)))
        world.clock.advance(1)
    assert not transport.disconnecting
    world.clock.advance(1)
    assert statuses(transport) == [408]
    assert transport.disconnecting


def test_a_connection_that_sends_nothing_is_closed_without_a_response(world) -> None:
    _, transport = world.connect()
    world.clock.advance(DEADLINES[ChannelState.READING])
    assert transport.value() == b""
    assert transport.disconnecting


def test_each_response_restarts_the_idle_timeout_and_each_request_the_read_timeout(world) -> None:
    channel, transport = world.connect()
    for _ in range(3):
        channel.dataReceived(GET)
        world.clock.advance(DEADLINES[ChannelState.IDLE] - 1)
    assert not transport.disconnecting
    channel.dataReceived(GET[:5])
    world.clock.advance(DEADLINES[ChannelState.READING] - 1)
    assert not transport.disconnecting
    world.clock.advance(1)
    assert statuses(transport) == [200, 200, 200, 408]
    idle, idle_transport = world.connect()
    idle.dataReceived(GET)
    world.clock.advance(DEADLINES[ChannelState.IDLE])
    assert statuses(idle_transport) == [200]
    assert idle_transport.disconnecting


@pytest.mark.parametrize("state", [ChannelState.ANSWERING, ChannelState.CLOSING])
def test_a_client_that_does_not_read_is_aborted(world, state: ChannelState) -> None:
    channel, transport = world.connect()
    if state is ChannelState.ANSWERING:
        world.process = lambda request: (request.channel.pauseProducing(), request.answer())
        channel.dataReceived(GET)
    else:
        channel.dataReceived(b"x\r\n\r\n")
    world.clock.advance(DEADLINES[state] - 1)
    assert not transport.aborted
    world.clock.advance(1)
    assert transport.aborted


# --- errors ---


def test_an_exception_is_reported_and_answered_with_500(world) -> None:
    world.process = lambda request: 1 / 0
    channel, transport = world.connect()
    channel.dataReceived(GET * 2)
    world.clock.turn(5)
    assert statuses(transport) == [500]
    assert [type(problem) for problem in world.reported] == [ZeroDivisionError]
    assert transport.disconnecting


def test_an_exception_during_a_response_aborts_the_connection(world) -> None:
    def process(request: Request) -> None:
        request.setHeader("Content-Length", "5")
        request.write(b"x")
        raise ZeroDivisionError

    world.process = process
    channel, transport = world.connect()
    channel.dataReceived(GET)
    assert statuses(transport) == [200]
    assert transport.aborted
    assert len(world.reported) == 1


PIECES = [
    *(b"GET", b"HEAD", b"OPTIONS", b"POST", b" ", b"/", b"*", b"http://", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n"),
    *(b"Host: localhost", b"Host:", b"Accept: \xff", b"Content-Length: 0", b"Content-Length: 3", b"Connection: close"),
    *(
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b": ",
        b"\0",
        b"\xff\xfe",
        b"%00",
        b"?a=b&c",
        b";",
        b"\t",
    ),
    *(b"Cookie: a=b; c", b"Cookie: =", b"Connection: \xff", b"Content-Type: multipart/form-data; boundary=x", GET),
]


def scrambled(random: random.Random) -> bytes:
    """Return a request with random invalid bytes in any part of it."""
    data = bytearray(GET if random.random() < 0.7 else b"".join(random.choices(PIECES, k=12)) + b"\r\n\r\n")
    for _ in range(random.randrange(4)):
        position = random.randrange(len(data) + 1)
        replacement = random.choice((bytes((random.randrange(256),)), random.choice(PIECES), random.randbytes(4)))
        data[position : position + random.randrange(3)] = replacement
    return bytes(data)


@pytest.mark.parametrize("seed", range(5))
def test_random_request_bytes_never_raise_an_exception(world, seed: int) -> None:
    numbers = random.Random(seed)
    for _ in range(1000):
        channel, transport = world.connect()
        data = b"".join(scrambled(numbers) for _ in range(numbers.randrange(1, 4)))
        while data and not transport.disconnecting:
            size = numbers.randrange(1, len(data) + 1)
            channel.dataReceived(data[:size])
            data = data[size:]
            world.clock.turn(3)
        world.clock.pump([DEADLINES[ChannelState.IDLE] + 1] * 3)
        assert transport.disconnecting or transport.aborted
        channel.connectionLost(Failure(ConnectionDone()))
    assert world.reported == []
    assert world.clock.getDelayedCalls() == []


def test_a_pipelined_request_waits_for_a_deferred_response(world) -> None:
    later: Deferred[None] = Deferred()
    world.process = lambda request: later.addCallback(lambda _: request.answer())
    channel, transport = world.connect()
    channel.dataReceived(GET * 2)
    later.callback(None)
    assert statuses(transport) == [200]
    world.clock.turn()
    assert statuses(transport) == [200, 200]
