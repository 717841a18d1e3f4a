"""The state of the service as metrics for Prometheus. Needs `prometheus_client`: the extra `metrics`."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from rtservice.observe.status_source import StatusSource

_VERSIONS = {"python": platform.python_version(), "twisted": version("twisted")}
_Families = tuple[tuple[str, type[CounterMetricFamily | GaugeMetricFamily], str, str], ...]

# Metrics of the hub: their keys in the counters of a process, types, names without prefix, and meanings.
_OF_HUBS: _Families = (
    ("published", CounterMetricFamily, "published", "Messages that the hub has accepted from this process."),
    ("publish_failed", CounterMetricFamily, "publish_failures", "Messages that the hub has not accepted."),
    ("received", CounterMetricFamily, "received", "Messages received from other processes."),
    ("delivered", CounterMetricFamily, "delivered", "Messages delivered, counted for each receiver."),
    ("dropped", CounterMetricFamily, "dropped", "Messages dropped because too many waited; a gap follows each."),
    ("gaps", CounterMetricFamily, "gaps", "Gaps reported, counted for each receiver."),
    ("reconnects", CounterMetricFamily, "reconnects", "New connections of the hub after the first one."),
    ("refused", CounterMetricFamily, "refused", "Commands that Redis refused."),
    ("claims_lost", CounterMetricFamily, "claims_lost", "Claims lost because the hub had no connection for too long."),
    ("topics", GaugeMetricFamily, "topics", "Topics with subscriptions."),
    ("subscriptions", GaugeMetricFamily, "subscriptions", "Active subscriptions."),
    ("members", GaugeMetricFamily, "members", "Members that this process has added."),
    ("claims", GaugeMetricFamily, "claims", "Claims that this process holds."),
    ("links", GaugeMetricFamily, "links", "Connections to the hubs of other workers."),
    ("in_flight", GaugeMetricFamily, "in_flight", "Messages sent to Redis that it has not confirmed."),
)

_STATES = ("starting", "serving", "draining", "stopped")

# RFC 9110, section 12.4.2.
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True)
class ExpositionFormat:
    """A text format of metrics: its media type, its encoder, and the bytes after the last family."""

    content_type: str
    _encode: Callable[[Any], bytes]
    end: bytes = b""

    def encode(self, family: Metric) -> bytes:
        """Return one family of metrics, encoded, without the end."""
        return self._encode(_Family(family)).removesuffix(self.end)


class _Family:
    """A registry of one family: encoders call only `collect`."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


TEXT = ExpositionFormat("text/plain; version=0.0.4; charset=utf-8", generate_latest)
OPEN_METRICS = ExpositionFormat(
    "application/openmetrics-text; version=1.0.0; charset=utf-8", openmetrics.generate_latest, b"# EOF\n"
)


def choose_format(accept: bytes) -> ExpositionFormat:
    """Return the format for a client with this Accept header (RFC 9110, section 12.5.1).

    Malformed and unknown parts of it are ignored. A client that does not prefer OpenMetrics 1.0.0 gets text.
    `choose_encoder` of prometheus_client raises for an invalid version.
    """
    text = open_metrics = 0.0
    for accepted in accept.decode("latin-1").lower().split(","):
        media_type, *parameters = (part.strip() for part in accepted.split(";"))
        given = dict(part.partition("=")[::2] for part in parameters)
        if not _QUALITY.fullmatch(given.get("q", "1")):
            continue
        quality = float(given.get("q", "1"))
        if media_type == "application/openmetrics-text" and given.get("version", "1.0.0").strip('"') == "1.0.0":
            open_metrics = max(open_metrics, quality)
        elif media_type == "text/plain":
            text = max(text, quality)
    return OPEN_METRICS if open_metrics and open_metrics >= text else TEXT


def families(source: StatusSource) -> Iterator[Metric]:
    """Return the state of the service as families of metrics."""
    return iter(_Figures(source).collect())


class _Figures(Collector):
    """Collects the state of the service for one scrape.

    The values of labels are listeners, workers and a bounded number of names. None comes from a peer.
    """

    def __init__(self, source: StatusSource) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        figures = self._source.figures()
        yield from self._service(figures)
        workers = [(str(worker["worker"]), worker["counters"]) for worker in figures["workers"]]
        yield from self._connections(workers)
        yield from self._hubs([(worker, counters["hub"]) for worker, counters in workers if counters["hub"]])
        yield from _protocol(workers)
        if figures["supervisor"] is not None:
            workers.append(("supervisor", figures["supervisor"]))
        yield from self._processes(workers)

    def _service(self, figures: dict[str, Any]) -> Iterator[Metric]:
        versions = {"version": figures["version"], **_VERSIONS}
        build = GaugeMetricFamily("rtservice_build_info", "Versions; the value is always 1.", labels=[*versions])
        build.add_metric(list(versions.values()), 1)
        yield build
        state = GaugeMetricFamily("rtservice_state", "1 for the current state, 0 for others.", labels=["state"])
        for name in _STATES:
            state.add_metric([name], name == figures["state"])
        yield state
        yield GaugeMetricFamily(
            "rtservice_ready",
            "1 when ready for traffic, as /readyz reports, otherwise 0.",
            figures["ready"],
        )
        yield GaugeMetricFamily(
            "rtservice_start_time_seconds", "Start of the service, in seconds since the epoch.", figures["started"]
        )
        ready = GaugeMetricFamily(
            "rtservice_worker_ready", "1 when the worker accepts, otherwise 0.", labels=["worker"]
        )
        for worker in figures["workers"]:
            ready.add_metric([str(worker["worker"])], worker["phase"] in ("ready", "serving"))
        yield ready
        starts = CounterMetricFamily("rtservice_worker_starts", "Processes started.", labels=["worker"])
        for number, count in figures["starts"].items():
            starts.add_metric([str(number)], count)
        yield starts
        exits = CounterMetricFamily(
            "rtservice_worker_exits", "Processes ended, by reason.", labels=["worker", "reason"]
        )
        for number, reasons in figures["exits"].items():
            for reason, count in reasons.items():
                exits.add_metric([str(number), reason], count)
        yield exits
        expiry = GaugeMetricFamily(
            "rtservice_certificate_expiry_timestamp_seconds",
            "Expiry of the listener's certificate that expires first, in seconds since the epoch.",
            labels=["listener"],
        )
        first: dict[str, float] = {}
        for certificate in figures["certificates"]:
            listener, expires = certificate["listener"], certificate["not_after"]
            first[listener] = min(expires, first.get(listener, expires))
        for listener, expires in first.items():
            expiry.add_metric([listener], expires)
        yield expiry

    def _connections(self, workers: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
        labels = ["listener", "worker"]
        now = GaugeMetricFamily("rtservice_connections", "Open connections, by phase.", labels=[*labels, "phase"])
        opened = CounterMetricFamily("rtservice_connections_opened", "Accepted connections.", labels=labels)
        closed = CounterMetricFamily(
            "rtservice_connections_closed", "Ended connections, by reason.", labels=[*labels, "reason"]
        )
        refused = CounterMetricFamily(
            "rtservice_connections_refused",
            "Connections refused after they were accepted, by the setting that refuses them.",
            labels=[*labels, "reason"],
        )
        failed = CounterMetricFamily(
            "rtservice_handshake_failures",
            "Connections that ended before their PROXY header and TLS handshake were complete, by kind.",
            labels=[*labels, "kind"],
        )
        received = CounterMetricFamily("rtservice_received_bytes", "Bytes received.", labels=labels)
        sent = CounterMetricFamily("rtservice_sent_bytes", "Bytes sent.", labels=labels)
        durations = HistogramMetricFamily(
            "rtservice_connection_duration_seconds", "Duration of ended connections.", labels=labels
        )
        for worker, counters in workers:
            for listener, counts in counters["listeners"].items():
                where = [listener, worker]
                for phase, count in counts["phase"].items():
                    now.add_metric([*where, phase], count)
                opened.add_metric(where, counts["opened"])
                received.add_metric(where, counts["in"])
                sent.add_metric(where, counts["out"])
                for family, name in ((closed, "closed"), (refused, "refused"), (failed, "handshake_failed")):
                    for label, count in counts[name].items():
                        family.add_metric([*where, label], count)
                _add_histogram(durations, where, counts["duration"], self._source.durations)
        yield from (now, opened, closed, refused, failed, received, sent, durations)

    def _hubs(self, hubs: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "rtservice_hub_up", "1 while the hub has its connection, otherwise 0.", labels=["worker"]
        )
        for worker, hub in hubs:
            if hub["up"] is not None:  # a process serves
                up.add_metric([worker], hub["up"])
        yield up
        for key, kind, name, text in _OF_HUBS:
            family = kind(f"rtservice_hub_{name}", text, labels=["worker"])
            for worker, hub in hubs:
                family.add_metric([worker], hub[key])
            yield family
        heartbeats = HistogramMetricFamily(
            "rtservice_hub_heartbeat_seconds",
            "Time from the publishing of a heartbeat through the engine to its delivery.",
            labels=["worker"],
        )
        for worker, hub in hubs:
            _add_histogram(heartbeats, [worker], hub["heartbeat"], self._source.heartbeats)
        yield heartbeats

    def _processes(self, workers: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
        lag = HistogramMetricFamily(
            "rtservice_reactor_lag_seconds", "Delay of the reactor's timed calls.", labels=["worker"]
        )
        for worker, counters in workers:
            _add_histogram(lag, [worker], counters["lag"], self._source.lags)
        yield lag
        gauges_and_counters: _Families = (
            ("cpu_seconds", CounterMetricFamily, "process_cpu_seconds", "User and system CPU time."),
            ("memory", GaugeMetricFamily, "process_resident_memory_bytes", "Resident memory."),
            ("descriptors", GaugeMetricFamily, "process_open_fds", "Open file descriptors."),
            ("descriptor_limit", GaugeMetricFamily, "process_max_fds", "Limit of open file descriptors."),
            ("dropped", CounterMetricFamily, "log_records_dropped", "Log records that could not be written in time."),
        )
        for key, kind, name, text in gauges_and_counters:
            family = kind(f"rtservice_{name}", text, labels=["worker"])
            for worker, counters in workers:
                family.add_metric([worker], counters.get(key, 0))
            yield family


def _protocol(workers: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    """Return the metrics of the hosted factory: see IMetrics."""
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    taken: dict[str, str] = {}
    for worker, counters in workers:
        for name, count in counters["protocol"].items():
            # `x` and `x_total` are one name to Prometheus, and it would reject the whole scrape. A compromised worker
            # may report the other name.
            if taken.setdefault(name.removesuffix("_total"), name) != name:
                continue
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            with suppress(ValueError):  # an invalid name of a compromised worker
                family = families.setdefault(
                    name,
                    kind(f"rtservice_protocol_{name}", "Metric of the hosted protocol.", labels=["worker"]),
                )
                family.add_metric([worker], count)
    yield from families.values()


def _add_histogram(
    family: HistogramMetricFamily, labels: list[str], counted: dict[str, Any], bounds: tuple[float, ...]
) -> None:
    names = [*map(str, bounds), "+Inf"]
    family.add_metric(labels, list(zip(names, accumulate(counted["buckets"]), strict=True)), counted["seconds"])
