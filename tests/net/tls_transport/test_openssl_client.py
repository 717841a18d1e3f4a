"""TLS in the transport: features of `openssl s_client` that `ssl` lacks."""

import os
import shutil
import subprocess
import threading
import time
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.threads import deferToThread

from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.recording import Recording
from tests.support.tls_client import Client
from tests.support.tls_libraries import BOTH

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl (Debian: openssl) is not installed")


class OpenSSLClient:
    """An `openssl s_client` with input from the test; its output is read continuously."""

    def __init__(self, address, *options: str) -> None:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{address[1]}", *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self.output = bytearray()
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            with self._news:
                self.output += data or b"<end of output>"
                self._news.notify_all()
            if not data:
                return

    def send(self, data: bytes) -> None:
        """Send one command in one write: s_client checks the first byte of each read."""
        self.process.stdin.write(data)

    def wait(self, text: bytes, count: int = 1) -> None:
        end = time.monotonic() + DEADLINE
        with self._news:
            while self.output.count(text) < count:
                assert not self.output.endswith(b"<end of output>"), self.output
                assert self._news.wait(end - time.monotonic()), (text, self.output)

    def __enter__(self) -> "OpenSSLClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        with self._news:
            self._news.wait_for(lambda: self.output.endswith(b"<end of output>"), DEADLINE)
        self.process.stdout.close()


@BOTH
@needs_openssl
@pytest_twisted.inlineCallbacks
def test_a_client_may_update_its_keys_and_request_an_update(serve):
    def client():
        with OpenSSLClient(served.address, "-tls1_3") as peer:
            peer.send(b"first\n")
            peer.wait(b"first\n")
            for i, command in enumerate((b"K\n", b"k\n", b"K\n", b"K\n")):
                peer.send(command)
                peer.wait(b"KEYUPDATE", i + 1)
                peer.send(b"message %d\n" % i)
                peer.wait(b"message %d\n" % i)

    served = serve(Recording())
    yield deferToThread(client)
    assert served.factory.received == b"first\nmessage 0\nmessage 1\nmessage 2\nmessage 3\n"
    yield eventually(lambda: served.closed)


@BOTH
@needs_openssl
@pytest_twisted.inlineCallbacks
def test_renegotiation_is_refused_without_affecting_other_clients(serve, client_context, logged):
    def client():
        with OpenSSLClient(served.address, "-tls1_2") as peer:
            peer.send(b"first\n")
            peer.wait(b"first\n")
            peer.send(b"R\n")
            peer.wait(b"RENEGOTIATING")
            peer.wait(b"<end of output>")
            return bytes(peer.output)

    served = serve(Recording())
    bystander = yield deferToThread(lambda: Client(served.address, client_context("TLSv1_2")).shake())
    with bystander:
        output = yield deferToThread(client)
        assert b"no renegotiation" in output
        yield eventually(lambda: served.closed)
        bystander.write(b"still here")
        answer = yield deferToThread(bystander.read_exactly, 10)
        assert answer == b"still here"
    assert logged == []
