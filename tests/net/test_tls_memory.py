"""TLS in memory: record boundaries, and how much input OpenSSL gets per turn."""

import contextlib
import random
import ssl
import struct
from itertools import pairwise

import pytest

from rtservice.net.tls import ServerTLS
from rtservice.net.tls_bounds import FIRST_READ, FULL_READ, MAX_RECORD, MAX_RECORDS
from rtservice.net.tls_memory import RECORD_SIZE, SEAL_SIZE, MemoryTLS, RecordBoundaries
from tests.support.tls_versions import VERSIONS


def records_of(sizes: list[int]) -> bytes:
    return b"".join(struct.pack("!BHH", 23, 0x0303, size) + bytes(size) for size in sizes)


@pytest.mark.parametrize("seed", range(50))
def test_record_boundaries_are_found_in_any_split(seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.choice((0, 1, 2, 5, 17, 200, 16640)) for _ in range(chance.randrange(1, 60))]
    data = records_of(sizes)
    boundaries = {0}
    for size in sizes:
        boundaries.add(max(boundaries) + 5 + size)
    records, at = RecordBoundaries(), 0
    while at < len(data):
        part = data[at : at + chance.choice((1, 2, 3, 4, 5, 6, 100, 5000, 50_000))]
        ends = records.take(part, 1000)
        assert ends[-1] == len(part), "all of the input is used"
        assert all(at + end in boundaries for end in ends[:-1]), "cut between records"
        begins = [0, *ends]
        assert all(end - begin <= MAX_RECORD for begin, end in pairwise(begins))
        at += len(part)
        assert records.at_boundary == (at in boundaries)


@pytest.mark.parametrize("seed", range(20))
def test_no_more_records_are_taken_than_requested(seed: int) -> None:
    chance = random.Random(seed)
    data = records_of([chance.randrange(0, 50) for _ in range(100)])
    records, rest, counts = RecordBoundaries(), data, []
    while rest:
        end = records.take(rest, 7)[-1]
        part, rest = rest[:end], rest[end:]
        count = 0
        while part:
            part = part[5 + (part[3] << 8 | part[4]) :]
            count += 1
        counts.append(count)
        assert records.at_boundary
    assert counts == [7] * 14 + [2]


def test_records_without_data_count_by_their_size() -> None:
    hello = struct.pack("!BHH", 22, 0x0303, 16384) + bytes(16384)
    assert RecordBoundaries().take(hello * 4, MAX_RECORDS) == [len(hello)]
    small = struct.pack("!BHH", 22, 0x0303, 128) + bytes(128)
    assert RecordBoundaries().take(small * 100, MAX_RECORDS)[-1] == 64 * len(small)


class Pair:
    """A server's MemoryTLS and a client; the test transfers the records."""

    def __init__(self, certificates, version: str = "TLSv1_3") -> None:
        context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
        self.server = MemoryTLS(context, server_side=True)
        client = ssl.create_default_context(cafile=certificates["ca.pem"])
        client.minimum_version = client.maximum_version = ssl.TLSVersion[version]
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        for _ in range(4):
            for shake in (self.client.do_handshake, self.server.object.do_handshake):
                with contextlib.suppress(ssl.SSLWantReadError):
                    shake()
                self.server.feed(self.outgoing.read())
                self.incoming.write(self.server.take())

    def send(self, data: bytes, size: int = RECORD_SIZE) -> bytes:
        """Return the client's output for this data, in records of `size` bytes."""
        for at in range(0, len(data), size):
            self.client.write(data[at : at + size])
        return self.outgoing.read()

    def receive(self, data: bytes) -> bytes:
        """Return what the client reads from the server's records."""
        self.incoming.write(data)
        received = b""
        try:
            while piece := self.client.read(1 << 16):
                received += piece
        except ssl.SSLWantReadError:
            pass
        return received


@VERSIONS
@pytest.mark.parametrize("seed", range(10))
def test_data_arrives_complete_in_any_split(certificates, version, seed) -> None:
    chance = random.Random(seed)
    pair = Pair(certificates, version)
    data = chance.randbytes(100_000)
    sent = b"".join(
        pair.send(data[at : at + 10_000], chance.choice((1, 10, 1000, RECORD_SIZE)))
        for at in range(0, len(data), 10_000)
    )
    received = b""
    while sent:
        size = chance.choice((1, 3, 5, 30, 1000, FIRST_READ, FULL_READ))
        received += pair.server.receive(sent[:size])
        sent = sent[size:]
        while pair.server.rest:
            rest, pair.server.rest = pair.server.rest, b""
            received += pair.server.receive(rest)
        assert pair.server.problem is None
    assert received == data
    assert pair.server.aligned


def test_a_read_of_many_small_records_is_processed_over_several_turns(certificates) -> None:
    pair = Pair(certificates)
    sent = pair.send(b"x" * 700, 1)
    assert FIRST_READ < len(sent) <= FULL_READ
    turns = [pair.server.receive(sent)]
    while pair.server.rest:
        rest, pair.server.rest = pair.server.rest, b""
        turns.append(pair.server.receive(rest))
    assert [len(turn) for turn in turns] == [MAX_RECORDS] * 5 + [60]


def test_data_before_a_broken_record_is_delivered_first(certificates) -> None:
    pair = Pair(certificates)
    good, bad = pair.send(b"good"), bytearray(pair.send(b"bad"))
    bad[-1] ^= 1
    assert pair.server.receive(good + bad) == b"good"
    assert pair.server.problem is not None
    assert pair.server.problem.__traceback__ is None
    assert pair.server.outgoing.pending, "an alert is sent"


def test_data_before_close_notify_is_delivered_first(certificates) -> None:
    pair = Pair(certificates)
    sent = pair.send(b"last")
    with pytest.raises(ssl.SSLWantReadError):
        pair.client.unwrap()
    assert pair.server.receive(sent + pair.outgoing.read()) == b"last"
    assert pair.server.finished


@VERSIONS
@pytest.mark.parametrize("size", [1, RECORD_SIZE - 1, RECORD_SIZE, RECORD_SIZE + 1, SEAL_SIZE])
def test_data_is_encrypted_in_the_fewest_possible_records(certificates, version, size) -> None:
    pair = Pair(certificates, version)
    pair.server.seal(b"y" * size)
    sealed = bytes(pair.server.sealed)
    records, count = RecordBoundaries(), 0
    rest = sealed
    while rest:
        rest = rest[records.take(rest, 1)[-1] :]
        count += 1
    assert count == -(-size // RECORD_SIZE)
    assert pair.receive(sealed) == b"y" * size


def test_close_notify_is_generated_once(certificates) -> None:
    pair = Pair(certificates)
    pair.server.notify()
    assert pair.server.take()
    pair.server.notify()
    assert not pair.server.take()
