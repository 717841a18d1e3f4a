"""Nodes behind HAProxy, with Redis as their hub and the files of etc/cluster: restarts that fail no connection."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rtservice.testing import Service
from tests.support.clients import echoes, is_greeted
from tests.support.deadline import DEADLINE
from tests.support.free_port import free_port
from tests.support.front import Front
from tests.support.load import Load
from tests.support.repository import ETC

# Debian installs it in /usr/sbin, which is not in the PATH of users.
HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

# Each node has the same ports on another address.
HOSTS = "127.0.0.2", "127.0.0.3"
REDIS = "127.0.0.4"

pytestmark = [
    pytest.mark.skipif(HAPROXY is None, reason="haproxy (Debian: haproxy) is not installed"),
    pytest.mark.skipif(os.getuid() != 0, reason="haproxy.cfg changes user and root directory, which needs root"),
]


class ClusterLoad(Load):
    """The clients of cluster_load.py, started with these arguments for `Clients`."""

    program = "cluster_load.py"


class LoadBalancer:
    """HAProxy with etc/cluster/haproxy.cfg. Clients connect with `front`, Prometheus with `metrics`."""

    def __init__(self, port: int, status_port: int) -> None:
        self.front, self.metrics = Front("127.0.0.1"), Front("127.0.0.1")
        with socket.socket(socket.AF_UNIX) as admin:
            admin.bind("")  # the kernel chooses a name: unix(7), "Autobind feature"
            admin.listen()
            self._admin = admin.getsockname()
            inherited = {"CLIENTS": self.front.fd, "METRICS": self.metrics.fd, "ADMIN_SOCKET": admin.fileno()}
            addresses = {f"NODE{number}": f"{host}:{port}" for number, host in enumerate(HOSTS, 1)}
            self.process = subprocess.Popen(
                [str(HAPROXY), "-db", "-f", str(ETC / "cluster/haproxy.cfg")],
                env={
                    **os.environ,
                    **addresses,
                    **{name: f"fd@{number}" for name, number in inherited.items()},
                    "STATUS_PORT": str(status_port),
                    "LOG": "stdout",
                },
                pass_fds=tuple(inherited.values()),
            )
        # From here only HAProxy has the sockets open: if it exits, clients are refused at once.
        self.front.socket.close()
        self.metrics.socket.close()

    def command(self, text: str) -> str:
        """Send a command to the runtime API, and return the answer."""
        with socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(DEADLINE)
            admin.connect(self._admin)
            admin.sendall(text.encode() + b"\n")
            return b"".join(iter(lambda: admin.recv(1 << 16), b"")).decode()

    def node(self, number: int) -> dict[str, str]:
        """Return the statistics of a node, 1 or 2."""
        rows = csv.DictReader(self.command("show stat nodes 4 -1").removeprefix("# ").splitlines())
        return next(row for row in rows if row["svname"] == f"node{number}")

    def is_up(self, number: int) -> bool:
        """Return whether the last health checks of a node succeeded. `UP 1/2` is after a failed one."""
        row = self.node(number)
        return row["status"] == "UP" and row["check_status"] == "L7OK"


class Cluster:
    """Two nodes behind HAProxy."""

    def __init__(self, service: Callable[..., Service], wait_for: Callable[..., Any], **env: str) -> None:
        self._service = service
        self._wait_for = wait_for
        self._env = env
        self._port, self._status_port = free_port(HOSTS[0]), free_port(HOSTS[0])
        self.nodes = {number: self.start(number) for number in (1, 2)}
        self.haproxy = LoadBalancer(self._port, self._status_port)

    def start(self, number: int) -> Service:
        """Start a node, and wait until it is ready for traffic."""
        host = HOSTS[number - 1]
        node = self._service(
            f"--config={ETC}/cluster/rtservice.toml",
            RTSERVICE_LISTEN=f"proxy:tcp:{self._port}:interface={host}",
            RTSERVICE_STATUS=f"tcp:{self._status_port}:interface={host}",
            RTSERVICE_PROXY_FROM="127.0.0.1",
            **self._env,
        )
        self._wait_for(lambda: self.readiness(number) == 200)
        return node

    def readiness(self, number: int) -> int:
        """Return the HTTP status of /readyz of a node; 0 if it is refused."""
        with contextlib.suppress(ConnectionError):
            try:
                url = f"http://{HOSTS[number - 1]}:{self._status_port}/readyz"
                with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code
            except urllib.error.URLError:
                pass
        return 0

    def wait_up(self, *numbers: int) -> None:
        self._wait_for(lambda: all(map(self.haproxy.is_up, numbers)))

    def wait_down(self, number: int) -> None:
        self._wait_for(lambda: self.haproxy.node(number)["status"] == "DOWN")

    def stop(self, number: int) -> None:
        """Stop a node gracefully."""
        assert self.nodes[number].stop() == 0

    def restart(self, number: int) -> None:
        """Stop a node gracefully, start it, and wait until HAProxy sends clients to it."""
        self.stop(number)
        self.nodes[number] = self.start(number)
        self.wait_up(number)

    def connect(self) -> socket.socket:
        """Connect a client through HAProxy, and read the greeting."""
        client = self.haproxy.front.connect()
        assert is_greeted(client)
        return client


def listens(host: str, port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, port), DEADLINE):
        return True
    return False


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """Wait until a cluster serves; end HAProxy after the test."""
    try:
        cluster.wait_up(1, 2)
        yield cluster
    finally:
        cluster.haproxy.process.terminate()
        cluster.haproxy.process.wait(DEADLINE)


@pytest.fixture
def drain_timeout() -> int:
    """Seconds; longer than HAProxy needs to find a drain, and as short as possible for a test."""
    return 3


@pytest.fixture
def cluster(service, wait_for, drain_timeout) -> Iterator[Cluster]:
    """A cluster whose nodes serve echo."""
    env = {"RTSERVICE_PROTOCOL": "echo", "RTSERVICE_DRAIN_TIMEOUT": str(drain_timeout)}
    with running(Cluster(service, wait_for, **env)) as cluster:
        yield cluster


@pytest.fixture
def redis(wait_for) -> Iterator[str]:
    """Start Redis with etc/cluster/redis.conf, and return the URL of the hub."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server (Debian: redis-server) is not installed")
    port = free_port(REDIS)
    config = str(ETC / "cluster/redis.conf")
    process = subprocess.Popen(["redis-server", config, "--bind", REDIS, "--port", str(port), "--dir", "/"])
    try:
        wait_for(lambda: listens(REDIS, port))
        yield f"redis://rtservice:CHANGE-ME@{REDIS}:{port}/0"
    finally:
        process.terminate()
        process.wait(DEADLINE)


@pytest.fixture
def chat(service, wait_for, drain_timeout, redis, tmp_path) -> Iterator[Cluster]:
    """A cluster whose nodes serve the chat."""
    (tmp_path / "hub").write_text(redis)
    env = {"RTSERVICE_HUB_FILE": str(tmp_path / "hub"), "RTSERVICE_DRAIN_TIMEOUT": str(drain_timeout)}
    with running(Cluster(service, wait_for, **env)) as cluster:
        yield cluster


def closed_because(services: list[Service]) -> dict[str, int]:
    """Return the reasons of the closed connections of all clients in the logs, each with its number."""
    found: dict[str, int] = {}
    for node in services:
        for record in node.events:
            if record["event"] == "connection.closed":
                found[record["reason"]] = found.get(record["reason"], 0) + 1
    return found


def test_a_rolling_restart_under_load_fails_no_connection(cluster, wait_for) -> None:
    stopped = list(cluster.nodes.values())
    with ClusterLoad(host="127.0.0.1", port=cluster.haproxy.front.address[1], rate=50, long=200) as load:
        for number in (1, 2):
            wait_for(lambda: load.count()["connected"] == 200)
            load.more(50)
            cluster.restart(number)
        wait_for(lambda: load.count()["connected"] == 200)
        load.more(50)
        count = load.stop()
    assert count["failed"] == []
    # The long ones have ended only at the end of a drain. Then their clients have connected again.
    drained = closed_because(stopped).get("drained", 0)
    assert count["ended"] == {"fin": drained}
    assert drained >= 200
    assert count["exchanges"] > 200
    for node in stopped:
        assert node.wait_event("drain.done")["aborted"] == 0
    assert set(closed_because([*stopped, *cluster.nodes.values()])) <= {"drained", "peer finished"}


def test_a_chat_continues_across_nodes_during_a_rolling_restart(chat, wait_for) -> None:
    stopped = list(chat.nodes.values())
    with ClusterLoad(host="127.0.0.1", port=chat.haproxy.front.address[1], talk="chat", rate=50, long=200) as load:
        for number in (1, 2):
            wait_for(lambda: load.count()["members"] == 200)
            load.more(50)
            chat.restart(number)
        wait_for(lambda: load.count()["members"] == 200)
        # They are on node 1 since the restart of node 2, and a new client gets the other node.
        with chat.haproxy.front.connect() as client, client.makefile("rw", newline="\r\n") as stream:
            stream.write("visitor\r\n/join room3\r\nhello from node 2\r\n/who\r\n")
            stream.flush()
            # A line of a member on node 1 arrives within the pace of the speaker, before or after the answer to /who.
            wanted = {"visitor has joined room3", "member60: number ", "member79"}
            for line in iter(stream.readline, ""):
                wanted -= {text for text in wanted if text in line}
                if not wanted:
                    break
            assert wanted == set()
            wait_for(lambda: load.count()["heard"].get("visitor: hello from node 2") == 20)
            assert all(int(chat.haproxy.node(number)["scur"]) for number in (1, 2))
        count = load.stop()
    assert count["failed"] == []
    assert count["lost"] == 0
    # A drained member gets a notice, and its connection a FIN after that. All have connected again.
    assert set(count["ended"]) == {"fin"}
    assert count["ended"]["fin"] >= 200
    for node in stopped:
        assert node.wait_event("drain.done")["aborted"] == 0
    # Redis has refused no command: see `user rtservice` in redis.conf.
    hub = {event["event"] for node in [*stopped, *chat.nodes.values()] for event in node.events}
    assert {name for name in hub if name.startswith("hub.")} <= {"hub.connected"}


@pytest.mark.parametrize("drain_timeout", [2 * DEADLINE])  # the drain ends with its last connection
def test_a_draining_node_gets_no_new_clients_while_its_open_connections_continue(cluster) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(cluster.connect()) for _ in range(4)]
        cluster.nodes[1].process.send_signal(signal.SIGTERM)
        cluster.wait_down(1)
        assert cluster.readiness(1) == 503
        before = cluster.haproxy.node(1)["stot"]
        new = [stack.enter_context(cluster.connect()) for _ in range(4)]
        assert cluster.haproxy.node(1)["stot"] == before
        assert all(map(echoes, (*clients, *new)))
    # leastconn gave each node two of the first ones.
    assert cluster.nodes[1].process.wait(DEADLINE) == 0
    done = cluster.nodes[1].wait_event("drain.done")
    assert (done["ended"], done["aborted"]) == (2, 0)


def test_connections_that_a_stopped_node_refuses_go_to_the_other_node(cluster) -> None:
    cluster.haproxy.command("disable health nodes/node1")  # HAProxy will not find out that the node has stopped
    cluster.stop(1)
    for _ in range(8):
        with cluster.connect() as client:
            assert echoes(client)
    assert cluster.haproxy.node(1)["status"] != "DOWN"
    assert int(cluster.haproxy.node(1)["wredis"]) > 0


def test_a_node_can_be_drained_with_the_runtime_api_before_it_stops(cluster) -> None:
    with contextlib.ExitStack() as stack:
        old = [stack.enter_context(cluster.connect()) for _ in range(2)]
        cluster.haproxy.command("set server nodes/node1 state drain")
        before = cluster.haproxy.node(1)["stot"]
        new = [stack.enter_context(cluster.connect()) for _ in range(4)]
        assert cluster.haproxy.node(1)["stot"] == before
        assert all(map(echoes, (*old, *new)))
        cluster.haproxy.command("set server nodes/node1 state ready")
        stack.enter_context(cluster.connect())
        assert int(cluster.haproxy.node(1)["stot"]) > int(before)


def test_a_graceful_stop_of_haproxy_serves_open_connections(cluster, wait_for) -> None:
    with cluster.connect() as client:
        cluster.haproxy.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: not listens(*cluster.haproxy.front.address))
        assert echoes(client)
    assert cluster.haproxy.process.wait(DEADLINE) == 0


def test_nodes_see_the_addresses_of_clients(cluster, wait_for) -> None:
    with cluster.haproxy.front.connect("127.0.0.9") as client:
        peer = f"127.0.0.9:{client.getsockname()[1]}"
    wait_for(
        lambda: any(
            event["event"] == "connection.closed" and event["peer"] == peer
            for node in cluster.nodes.values()
            for event in node.events
        )
    )


def test_haproxy_serves_metrics_of_the_nodes(cluster) -> None:
    host, port = cluster.haproxy.metrics.address
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=DEADLINE) as answer:
        text = answer.read().decode()
    assert 'haproxy_server_status{proxy="nodes",server="node1",state="UP"} 1' in text
