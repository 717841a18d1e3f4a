"""The status site: its responses, the hosts that it serves, and its limits."""

from __future__ import annotations

import importlib.resources
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import Logger, formatEvent

import rtservice.observe
from rtservice.hub.carrier import HEARTBEATS
from rtservice.observe.site import make_site
from rtservice.observe.status_source import HUB_COUNTERS, StatusSource
from rtservice.process.counters import DURATIONS, HUB_GAUGES, HUB_TOTALS, HUB_UP, LAGS, CounterKey
from rtservice.process.registry import COLUMNS
from tests.support.repository import ETC

COUNTERS = {
    CounterKey("open"): 1,
    CounterKey("memory"): 50 << 20,
    CounterKey("cpu_us"): 1_500_000,
    CounterKey("descriptors"): 9,
    CounterKey("descriptor_limit"): 1024,
    CounterKey("lag", "0"): 7,
    CounterKey("lag", "10"): 1,
    CounterKey("lag_us"): 6_000_000,
    CounterKey("opened", "", "tcp:a"): 3,
    CounterKey("closed", "peer finished", "tcp:a"): 2,
    CounterKey("phase", "open", "tcp:a"): 1,
    CounterKey("in", "", "tcp:a"): 10,
    CounterKey("out", "", "tcp:a"): 76,
    CounterKey("duration", "0", "tcp:a"): 1,
    CounterKey("duration", "8", "tcp:a"): 1,
    CounterKey("duration_us", "", "tcp:a"): 40_000_000_000,
    CounterKey("handshake_failed", "HTTP_REQUEST", "tcp:a"): 1,
    CounterKey("refused", "max-connections", "tcp:a"): 4,
    CounterKey("hub", "up"): 1,
    CounterKey("hub", "delivered"): 40,
    CounterKey("hub", "publish_failed"): 2,
    CounterKey("hub", "topics"): 3,
    CounterKey("hub_heartbeat", "1"): 3,
    CounterKey("hub_heartbeat", "11"): 1,
    CounterKey("hub_heartbeat_us"): 9_002_000,
    CounterKey("protocol", "said_total"): 5,
    CounterKey("protocol", "seconds_per_word"): 0.25,
}

ROW = [0, "192.0.2.1:5", "tcp:a", "open", 2.5, None, 10, 22]


class Service:
    """The state that the status source reads."""

    def __init__(self) -> None:
        self.ready = True
        self.hosts: list[str] = []
        self.queries: list[tuple[str, int]] = []
        self.answer: Deferred = succeed(([ROW, [1, *ROW[1:]]], [2]))

    def overview(self) -> dict[str, Any]:
        worker = {"worker": 0, "pid": 1, "phase": "serving", "age": 5.0, "counted": 7.0, "counters": COUNTERS}
        return {
            "state": "serving" if self.ready else "draining",
            "ready": self.ready,
            "status": "one line",
            "time": 1000.0,
            "started": 995.0,
            "listeners": ["tcp:a", "ssl:b"],
            "certificates": [{"listener": "ssl:b", "path": "/c.pem", "names": "b", "not_after": 2000}],
            "workers": [worker],
            "supervisor": {CounterKey("memory"): 1},
            "starts": {0: 2},
            "exits": {0: {"SIGKILL": 1}},
        }

    def rows(self, sort: str, count: int) -> Deferred:
        self.queries.append((sort, count))
        return self.answer

    def source(self) -> StatusSource:
        return StatusSource(
            version="1.2.3",
            standing=lambda: (self.ready, "one line"),
            overview=self.overview,
            rows=self.rows,
            settings=lambda: {"port": "8080"},
            refresh=lambda: succeed(None),
            hosts=lambda: frozenset(self.hosts),
            columns=COLUMNS,
            durations=DURATIONS,
            lags=LAGS,
            heartbeats=HEARTBEATS,
        )


@pytest.fixture
def service() -> Service:
    return Service()


def ask(
    service: Service, request: str, site: Any = None, transport: StringTransport | None = None
) -> tuple[int, dict[str, str], str]:
    """Send a request; return the status, the headers and the body of the response."""
    site = site or make_site(service.source(), Clock())
    channel = site.buildProtocol(None)
    transport = transport or StringTransport()
    channel.makeConnection(transport)
    channel.dataReceived(request.encode("latin-1"))
    for _ in range(100):  # on a busy machine it may take several reactor turns
        site.clock.advance(0)
    head, _, body = transport.value().decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    return (
        int(status.split()[1]),
        {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)},
        body,
    )


def get(service: Service, path: str, site: Any = None) -> tuple[int, dict[str, str], str]:
    return ask(service, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n", site)


def test_healthz_reports_the_process_and_readyz_the_service(service: Service) -> None:
    assert get(service, "/healthz")[0] == get(service, "/readyz")[0] == 200
    service.ready = False
    assert get(service, "/healthz")[0] == 200
    status, _, body = get(service, "/readyz")
    assert (status, body) == (503, "one line\n")


@pytest.mark.parametrize(
    "path", ["/", "/page.js", "/page.css", "/metrics", "/status.json", "/nothing", "/status.json?x=1"]
)
def test_every_response_has_security_headers(service: Service, path: str) -> None:
    _, headers, _ = get(service, path)
    policy = headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert not any("unsafe" in rule or "http" in rule or "*" in rule for rule in policy)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"


def test_the_page_has_no_inline_script_or_style(service: Service) -> None:
    _, _, body = get(service, "/")
    assert '<script src="page.js" defer></script>' in body
    assert "style=" not in body
    assert "://" not in body
    script = importlib.resources.files("rtservice.observe").joinpath("page", "page.js").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "CONNECT", "PATCH", "BREW"])
def test_other_methods_are_rejected_with_405(service: Service, method: str) -> None:
    status, headers, _ = ask(service, f"{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, headers["allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize("header", ["Content-Length: 9", "Content-Length: 999999999999", "Transfer-Encoding: chunked"])
def test_a_request_body_is_rejected_before_it_arrives(service: Service, header: str) -> None:
    status, headers, _ = ask(service, f"GET / HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n9\r\nxxxx")
    assert (status, headers["connection"]) == (413, "close")


def test_head_is_answered_like_get_without_a_body(service: Service) -> None:
    status, headers, body = ask(service, "HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, headers["content-length"], body) == (200, "6", "")


def test_404_lists_the_available_paths(service: Service) -> None:
    status, _, body = get(service, "/<b>")
    assert status == 404
    assert "/metrics" in body
    assert "<b>" not in body


def test_status_json_has_the_snapshot_and_a_page_of_connections(service: Service) -> None:
    status, headers, body = get(service, "/status.json?sort=bytes_in&offset=1&limit=10")
    assert (status, headers["content-type"]) == (200, "application/json")
    found = json.loads(body)
    assert service.queries == [("bytes_in", 500)]
    assert found["connections"]["rows"] == [
        {
            "worker": 1,
            "peer": "192.0.2.1:5",
            "listener": "tcp:a",
            "phase": "open",
            "age": 2.5,
            "idle": None,
            "bytes_in": 10,
            "bytes_out": 22,
        }
    ]
    assert found["connections"]["missing"] == [2]
    assert found["settings"] == {"port": "8080"}
    listeners = found["workers"][0]["counters"]["listeners"]
    assert listeners["tcp:a"]["phase"] == {"proxy": 0, "tls": 0, "open": 1, "closing": 0}
    assert listeners["tcp:a"]["duration"] == {"buckets": [1, 0, 0, 0, 0, 0, 0, 0, 1], "seconds": 40_000.0}
    assert listeners["ssl:b"]["opened"] == 0
    assert found["workers"][0]["counters"]["protocol"] == {"said_total": 5, "seconds_per_word": 0.25}


def test_limit_0_queries_no_connections(service: Service) -> None:
    assert json.loads(get(service, "/status.json?limit=0")[2])["connections"]["rows"] == []
    assert service.queries == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("sort=x", "sort 'x' is unknown; accepted are peer, listener,"),
        ("sort=--age", "sort '--age' is unknown"),
        ("sort=%1b", r"sort '\x1b' is unknown"),
        ("limit=-1", "limit '-1' is not a whole number"),
        ("limit=99999999999999999", "is not a whole number"),
        ("offset=400&limit=101", "offset + limit is 501, above the maximum of 500"),
        ("limit=1&page=2", "unknown parameter 'page'; accepted are sort, offset, limit"),
        ("&".join(f"a{number}=1" for number in range(11)), "Max number of fields exceeded"),
    ],
)
def test_an_invalid_query_is_rejected_with_the_accepted_values(service: Service, query: str, problem: str) -> None:
    status, _, body = get(service, f"/status.json?{query}")
    assert status == 400
    assert problem in body
    assert service.queries == []


def test_a_client_may_disconnect_before_the_response(service: Service) -> None:
    from twisted.internet.error import ConnectionDone
    from twisted.python.failure import Failure

    service.answer = Deferred()
    channel = make_site(service.source(), Clock()).buildProtocol(None)
    channel.makeConnection(StringTransport())
    channel.dataReceived(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
    channel.connectionLost(Failure(ConnectionDone()))
    service.answer.callback(([ROW], []))


def test_metric_names_and_units_follow_the_prometheus_conventions(service: Service) -> None:
    status, headers, body = get(service, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    for line in (
        'rtservice_connections{listener="tcp:a",phase="open",worker="0"} 1.0',
        'rtservice_connections_opened_total{listener="tcp:a",worker="0"} 3.0',
        'rtservice_connections_opened_total{listener="ssl:b",worker="0"} 0.0',
        'rtservice_connections_closed_total{listener="tcp:a",reason="peer finished",worker="0"} 2.0',
        'rtservice_connections_refused_total{listener="tcp:a",reason="max-connections",worker="0"} 4.0',
        'rtservice_handshake_failures_total{kind="HTTP_REQUEST",listener="tcp:a",worker="0"} 1.0',
        'rtservice_received_bytes_total{listener="tcp:a",worker="0"} 10.0',
        'rtservice_connection_duration_seconds_bucket{le="36000.0",listener="tcp:a",worker="0"} 1.0',
        'rtservice_connection_duration_seconds_bucket{le="+Inf",listener="tcp:a",worker="0"} 2.0',
        'rtservice_connection_duration_seconds_sum{listener="tcp:a",worker="0"} 40000.0',
        'rtservice_reactor_lag_seconds_count{worker="0"} 8.0',
        'rtservice_worker_starts_total{worker="0"} 2.0',
        'rtservice_worker_exits_total{reason="SIGKILL",worker="0"} 1.0',
        'rtservice_certificate_expiry_timestamp_seconds{listener="ssl:b"} 2000.0',
        'rtservice_build_info{python="3.',
        'rtservice_state{state="serving"} 1.0',
        'rtservice_process_cpu_seconds_total{worker="0"} 1.5',
        'rtservice_process_resident_memory_bytes{worker="supervisor"} 1.0',
        'rtservice_hub_up{worker="0"} 1.0',
        'rtservice_hub_delivered_total{worker="0"} 40.0',
        'rtservice_hub_publish_failures_total{worker="0"} 2.0',
        'rtservice_hub_gaps_total{worker="0"} 0.0',
        'rtservice_hub_topics{worker="0"} 3.0',
        'rtservice_hub_heartbeat_seconds_bucket{le="0.001",worker="0"} 3.0',
        'rtservice_hub_heartbeat_seconds_count{worker="0"} 4.0',
        'rtservice_hub_heartbeat_seconds_sum{worker="0"} 9.002',
        "# TYPE rtservice_protocol_said_total counter",
        'rtservice_protocol_said_total{worker="0"} 5.0',
        "# TYPE rtservice_protocol_seconds_per_word gauge",
        'rtservice_protocol_seconds_per_word{worker="0"} 0.25',
    ):
        assert f"\n{line}" in f"\n{body}", line


@pytest.mark.parametrize("file", ["rtservice.rules.yml", "grafana.json"])
def test_alerts_and_the_dashboard_use_existing_metrics(service: Service, file: str) -> None:
    _, _, body = get(service, "/metrics")
    existing = {re.split(r"[{ ]", line)[0] for line in body.splitlines() if line[0] != "#"}
    named = set(re.findall(r"\brtservice_[a-z_]+", (ETC / file).read_text()))
    assert len(named) > 5
    assert named <= existing


def test_a_process_that_does_not_use_the_hub_has_no_metrics_of_it(service: Service, monkeypatch) -> None:
    for key in [key for key in COUNTERS if key.name.startswith("hub")]:
        monkeypatch.delitem(COUNTERS, key)
    _, _, body = get(service, "/metrics")
    assert "# TYPE rtservice_hub_up gauge" in body
    assert "\nrtservice_hub_" not in body
    assert json.loads(get(service, "/status.json")[2])["workers"][0]["counters"]["hub"] is None


def test_a_slot_without_a_worker_has_totals_of_the_hub_but_is_neither_up_nor_down(
    service: Service, monkeypatch
) -> None:
    monkeypatch.delitem(COUNTERS, HUB_UP)
    _, _, body = get(service, "/metrics")
    assert "\nrtservice_hub_up{" not in body
    assert 'rtservice_hub_delivered_total{worker="0"} 40.0' in body
    hub = json.loads(get(service, "/status.json")[2])["workers"][0]["counters"]["hub"]
    assert (hub["up"], hub["delivered"], hub["dropped"]) == (None, 40, 0)
    assert hub.keys() == {"up", "heartbeat", *HUB_COUNTERS}
    assert {*HUB_COUNTERS, "up"} == {*HUB_TOTALS, *HUB_GAUGES}


NO_COUNTERS = [
    *(CounterKey("lag", "99"), CounterKey("lag", "x"), CounterKey("duration", "-99", "tcp:a"), CounterKey("lag")),
    *(CounterKey("listeners"), CounterKey("x", "y", "z"), CounterKey("opened", "x", "tcp:a"), CounterKey("")),
    *(CounterKey("closed", "", "tcp:a"), CounterKey("seconds", "x"), CounterKey("protocol", "{}")),
    *(CounterKey("protocol"), CounterKey("protocol", "said")),
    *(
        CounterKey("hub"),
        CounterKey("hub_heartbeat"),
        CounterKey("hub_heartbeat", "12"),
        CounterKey("hub", "heartbeat"),
    ),
]


@pytest.mark.parametrize("key", NO_COUNTERS, ids=str)
def test_an_invalid_counter_does_not_affect_other_counters(service: Service, monkeypatch, key: CounterKey) -> None:
    monkeypatch.setitem(COUNTERS, key, 5)
    status, _, body = get(service, "/metrics")
    assert status == 200
    assert 'rtservice_connections_opened_total{listener="tcp:a",worker="0"} 3.0' in body
    assert get(service, "/status.json")[0] == 200


@pytest.mark.parametrize("name", ["said", "seconds_per_word_total"])
def test_conflicting_counter_names_do_not_break_a_scrape(service: Service, monkeypatch, name: str) -> None:
    monkeypatch.setitem(COUNTERS, CounterKey("protocol", f"{name}"), 7)
    _, _, body = get(service, "/metrics")
    assert f"rtservice_protocol_{name}{{" not in body
    assert 'rtservice_protocol_said_total{worker="0"} 5.0' in body
    assert 'rtservice_protocol_seconds_per_word{worker="0"} 0.25' in body


def test_openmetrics_is_sent_to_a_client_that_accepts_it(service: Service) -> None:
    accept = "Accept: application/openmetrics-text; version=1.0.0"
    _, headers, body = ask(service, f"GET /metrics HTTP/1.1\r\nHost: localhost\r\n{accept}\r\n\r\n")
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_accepts_the_metrics(service: Service) -> None:
    _, _, body = get(service, "/metrics")
    checked = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, text=True, timeout=30)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("accept", "open_metrics"),
    [
        ("application/openmetrics-text; version=1.0.0", True),
        ("Application/OpenMetrics-Text", True),
        ('application/openmetrics-text;version="1.0.0";charset=utf-8', True),
        # Prometheus 2 and 3.
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
            "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            True,
        ),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;q=0.4", True),
        ("text/plain;version=0.0.4;q=0.9,application/openmetrics-text;version=1.0.0;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text; version=x", False),
        ("application/openmetrics-text; version=", False),
        ("application/openmetrics-text; version=999999999999999999.9", False),
        ("application/openmetrics-text; version=0.0.1", False),
        ("application/openmetrics-text; version=1.0.0; q=x", False),
        ("application/openmetrics-text;q=inf", False),
        ("\xff", False),
        (";;;,,,===;q=,", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_the_accept_header_selects_the_format_of_the_metrics(service: Service, accept: str, open_metrics: bool) -> None:
    status, headers, body = ask(service, f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n")
    assert status == 200
    assert headers["content-type"].startswith("application/openmetrics-text") is open_metrics
    assert body.endswith("# EOF\n") is open_metrics


def test_several_accept_headers_are_combined(service: Service) -> None:
    accept = "Accept: text/plain;q=0.1\r\nAccept: application/openmetrics-text"
    _, headers, _ = ask(service, f"GET /metrics HTTP/1.1\r\nHost: localhost\r\n{accept}\r\n\r\n")
    assert headers["content-type"].startswith("application/openmetrics-text")


# --- hosts ---


def test_an_unknown_host_gets_421_with_the_setting_to_change(service: Service) -> None:
    for path in ("/", "/healthz", "/status.json", "/nothing"):
        status, _, body = ask(service, f"GET {path} HTTP/1.1\r\nHost: attacker.example:9090\r\n\r\n")
        assert status == 421
        assert "--status-host" in body
    assert service.queries == []
    service.hosts = ["attacker.example"]  # as after a reload
    assert ask(service, "GET /healthz HTTP/1.1\r\nHost: Attacker.Example:9090\r\n\r\n")[0] == 200


@pytest.mark.parametrize(
    ("request_head", "code"),
    [
        ("GET /healthz HTTP/1.1\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        ("GET /healthz HTTP/1.0\r\n", 200),
        ("GET http://localhost:9090/healthz HTTP/1.1\r\nHost: attacker.example\r\n", 200),
        ("GET http://attacker.example/healthz HTTP/1.1\r\nHost: localhost\r\n", 421),
        ("GET http://localhost:9090/healthz HTTP/1.1\r\n", 400),
    ],
)
def test_a_request_has_one_host_and_an_absolute_target_takes_precedence(
    service: Service, request_head: str, code: int
) -> None:
    assert ask(service, f"{request_head}\r\n")[0] == code


def test_a_missing_host_header_closes_the_connection(service: Service) -> None:
    transport = StringTransport()
    status, headers, _ = ask(service, "GET / HTTP/1.1\r\n\r\n", transport=transport)
    assert (status, headers["connection"]) == (400, "close")
    assert transport.disconnecting


def test_any_host_is_served_on_a_unix_socket(service: Service) -> None:
    transport = StringTransport(hostAddress=UNIXAddress("/run/status"))
    assert ask(service, "GET /healthz HTTP/1.1\r\nHost: docker\r\n\r\n", transport=transport)[0] == 200


@pytest.mark.parametrize("target", ["*", "/", "/metrics", "http://localhost", "http://localhost/status.json"])
def test_options_lists_the_allowed_methods(service: Service, target: str) -> None:
    status, headers, body = ask(service, f"OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, headers["allow"], body) == (204, "GET, HEAD, OPTIONS", "")
    assert "content-length" not in headers


# --- caching and failures ---


def test_pages_of_connections_share_one_snapshot(service: Service) -> None:
    site = make_site(service.source(), Clock())
    for offset in range(50):
        for limit in (1, 5):
            found = json.loads(get(service, f"/status.json?offset={offset}&limit={limit}", site)[2])
            assert (found["connections"]["offset"], found["connections"]["limit"]) == (offset, limit)
            assert len(found["connections"]["rows"]) == max(0, min(limit, 2 - offset))
    assert service.queries == [("-age", 500)]
    site.clock.advance(1)
    get(service, "/status.json", site)
    assert service.queries == [("-age", 500)] * 2


def test_readiness_is_never_cached(service: Service) -> None:
    site = make_site(service.source(), Clock())
    assert get(service, "/readyz", site)[0] == 200
    service.ready = False
    assert get(service, "/readyz", site)[0] == 503


def test_a_failure_gives_500_and_a_rate_limited_record_without_a_traceback(service: Service, monkeypatch) -> None:
    events: list[dict[str, Any]] = []
    monkeypatch.setattr("rtservice.observe.site._log", Logger(observer=events.append))
    failing = True

    def overview() -> dict[str, Any]:
        if failing:
            raise ValueError("\x1b" * 1000)
        return Service.overview(service)

    service.overview = overview
    site = make_site(service.source(), Clock())
    for path in ("/metrics", "/status.json") * 20:
        assert get(service, path, site)[0] == 500
        site.clock.advance(1)
    texts = [formatEvent(event) for event in events]
    assert 1 < len(texts) <= 5
    assert not any("log_failure" in event for event in events)
    assert all("ValueError" in text and "test_site.py" in text and "\x1b" not in text for text in texts)
    assert all(len(text) < 400 for text in texts)
    assert {event["event"] for event in events} == {"status.answer_failed"}
    assert events[0]["suppressed"] == 0 < events[1]["suppressed"]
    failing = False
    assert get(service, "/metrics", site)[0] == 200


def test_without_prometheus_client_only_the_metrics_are_unavailable(service: Service, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "rtservice.observe.metrics", raising=False)
    monkeypatch.delattr(rtservice.observe, "metrics", raising=False)
    site = make_site(service.source(), Clock())
    status, _, body = get(service, "/metrics", site)
    assert status == 501
    assert "pip install 'rtservice[metrics]'" in body
    assert get(service, "/status.json", site)[0] == 200
