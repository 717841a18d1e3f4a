"""What is wrong at the start is one line that names the setting and the value, and a status that is not 0."""

import socket

import pytest


def assert_refused(result, *names: str) -> None:
    assert result.returncode != 0
    assert "Traceback" not in result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for name in names:
        assert name in lines[0]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--nonsense"], ["nonsense"]),
        (["--port", "70000"], ["--port", "'70000'", "0 to 65535"]),
        (["--port", "http"], ["--port", "'http'"]),
        (["--port"], ["--port"]),
        (["--backlog", "0"], ["--backlog", "'0'"]),
        (["--max-message", "0"], ["--max-message", "'0'"]),
        (["--framing", "xml"], ["--framing", "'xml'", "netstring"]),
        (["--greeting", r"\q"], ["--greeting", "escape"]),
        (["--framing=line", r"--greeting=a\nb"], ["--greeting", "line feed"]),
        (["surplus"], ["'surplus'"]),
        (["--port=0", "--interface", "203.0.113.1"], ["--port 0", "--interface 203.0.113.1", "cannot assign"]),
        (["--interface", "no.such.host.invalid"], ["--interface", "no.such.host.invalid"]),
        (["--listen", "nosuch:1"], ["--listen nosuch:1", "Unknown endpoint type"]),
        (["--listen", "ssl:1:privateKey=/no/key"], ["--listen ssl:1:privateKey=/no/key"]),
        (["--listen", "tcp:"], ["--listen tcp:", "port is missing"]),
        (["--listen", "tcp:1:bogus=2"], ["--listen tcp:1:bogus=2", "'bogus'"]),
        (["--listen", "unix:/no/such/place/s"], ["--listen unix:/no/such/place/s", "'/no/such/place'"]),
        (["--listen", "systemd:index=0"], ["--listen systemd:index=0", "no sockets were passed"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_refused_with_one_line(run, arguments, names) -> None:
    assert_refused(run("-n", "--pidfile=", "rtservice", *arguments), *names)


@pytest.mark.parametrize(
    "twistd", [["-n", "--pidfile="], ["--pidfile=d.pid", "--logfile=d.log"]], ids=["fore", "daemon"]
)
def test_a_port_in_use_is_refused_also_when_daemonizing(run, tmp_path, twistd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run(*twistd, "rtservice", "--interface=127.0.0.1", "--port", port)
        assert_refused(result, f"--port {port}", f"127.0.0.1:{port}", "address already in use")
    assert not (tmp_path / "d.pid").exists()


def test_starting_twice_is_refused_and_the_first_goes_on(service, run, read_all) -> None:
    first = service("--port", "0")
    assert_refused(run("-n", "--pidfile=", "rtservice", "--port", str(first.port)), f"--port {first.port}")
    with first.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"Hello from the server!"


def test_a_unix_socket_in_use_is_refused_and_a_stale_one_taken_over(service, run, tmp_path, read_all) -> None:
    path = tmp_path / "s"
    first = service("--listen", f"unix:{path}")
    assert_refused(run("-n", "--pidfile=", "rtservice", "--listen", f"unix:{path}"), str(path), "answers on it")
    first.process.kill()
    first.process.wait()
    assert path.exists()
    service("--listen", f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"Hello from the server!"


def test_a_file_that_is_no_socket_is_refused_and_kept(run, tmp_path) -> None:
    (tmp_path / "s").write_text("precious")
    assert_refused(run("-n", "--pidfile=", "rtservice", "--listen", "unix:s"), "not a socket")
    assert (tmp_path / "s").read_text() == "precious"


def test_an_endpoint_of_a_plugin_that_fails_is_refused_with_its_description(run, tmp_path, environment) -> None:
    plugins = tmp_path / "twisted" / "plugins"
    plugins.mkdir(parents=True)
    (plugins / "broken_endpoint.py").write_text(
        """
from zope.interface import implementer
from twisted.plugin import IPlugin
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IStreamServerEndpointStringParser

@implementer(IPlugin, IStreamServerEndpointStringParser)
class Parser:
    prefix = "broken"
    def parseStreamServer(self, reactor, when):
        self.reactor, self.when = reactor, when
        return self
    def listen(self, factory):
        if self.when == "now":
            return fail(OSError("broken by design"))
        result = Deferred()
        self.reactor.callLater(0, result.errback, OSError("broken by design"))
        return result

parser = Parser()
"""
    )
    environment["PYTHONPATH"] = str(tmp_path)
    for when in ("now", "later"):
        result = run("-n", "--pidfile=", "rtservice", "--listen", f"broken:{when}")
        assert result.returncode == 1
        assert f"--listen broken:{when}: broken by design" in result.stdout + result.stderr
        assert "Traceback" not in result.stdout + result.stderr
    result = run("--pidfile=d.pid", "--logfile=d.log", "rtservice", "--listen", "broken:now")
    assert result.returncode == 1
    assert "broken by design" in (tmp_path / "d.log").read_text()
    assert not (tmp_path / "d.pid").exists()


def test_help_and_version_name_the_service(run) -> None:
    result = run("rtservice", "--help")
    assert result.returncode == 0
    for option in ("--port", "--listen", "--greeting", "--framing"):
        assert option in result.stdout
    assert run("rtservice", "--version").stdout.startswith("rtservice ")
