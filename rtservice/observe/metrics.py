"""How a service stands, for Prometheus. Needs `prometheus_client`: the extra `metrics`."""

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

from rtservice.observe.figures import StatusSource

_VERSIONS = {"python": platform.python_version(), "twisted": version("twisted")}
_STATES = ("starting", "serving", "draining", "stopped")

# RFC 9110, section 12.4.2.
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True)
class Format:
    """A text format of metrics: its media type, how a registry is encoded, and what ends all of it."""

    content_type: str
    _encode: Callable[[Any], bytes]
    end: bytes = b""

    def encode(self, family: Metric) -> bytes:
        """One family of metrics, without the end."""
        return self._encode(_Family(family)).removesuffix(self.end)


class _Family:
    """A registry of one family, which is all that encoders ask."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


TEXT = Format("text/plain; version=0.0.4; charset=utf-8", generate_latest)
OPEN_METRICS = Format(
    "application/openmetrics-text; version=1.0.0; charset=utf-8", openmetrics.generate_latest, b"# EOF\n"
)


def choose_format(accept: bytes) -> Format:
    """The format for a client that accepts these types (RFC 9110, section 12.5.1).

    What is malformed or unknown in them is passed over, and text is what everybody gets who does not prefer
    OpenMetrics 1.0.0. prometheus_client has a `choose_encoder`, which raises for a version that is none.
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
    """One look at the service, as families of metrics, each of which can be encoded by itself."""
    return iter(_Figures(source).collect())


class _Figures(Collector):
    """One look at the service, for one scrape.

    Labels are listeners, workers, and words of which there are few; nothing of a peer's is one.
    """

    def __init__(self, source: StatusSource) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        figures = self._source.figures()
        yield from self._service(figures)
        workers = [(str(one["worker"]), one["counters"]) for one in figures["workers"]]
        yield from self._connections(workers)
        yield from _protocol(workers)
        if figures["supervisor"] is not None:
            workers.append(("supervisor", figures["supervisor"]))
        yield from self._processes(workers)

    def _service(self, figures: dict[str, Any]) -> Iterator[Metric]:
        versions = {"version": figures["version"], **_VERSIONS}
        build = GaugeMetricFamily("rtservice_build_info", "What runs; always 1.", labels=[*versions])
        build.add_metric(list(versions.values()), 1)
        yield build
        state = GaugeMetricFamily("rtservice_state", "1 for the state that the service is in.", labels=["state"])
        for name in _STATES:
            state.add_metric([name], name == figures["state"])
        yield state
        yield GaugeMetricFamily(
            "rtservice_ready", "Whether the service is a place to send clients to, as /readyz says.", figures["ready"]
        )
        yield GaugeMetricFamily(
            "rtservice_start_time_seconds", "When the service started, since the epoch.", figures["started"]
        )
        ready = GaugeMetricFamily("rtservice_worker_ready", "Whether the worker accepts.", labels=["worker"])
        for worker in figures["workers"]:
            ready.add_metric([str(worker["worker"])], worker["phase"] in ("ready", "serving"))
        yield ready
        starts = CounterMetricFamily("rtservice_worker_starts", "Processes spawned.", labels=["worker"])
        for number, count in figures["starts"].items():
            starts.add_metric([str(number)], count)
        yield starts
        exits = CounterMetricFamily("rtservice_worker_exits", "Processes ended.", labels=["worker", "reason"])
        for number, reasons in figures["exits"].items():
            for reason, count in reasons.items():
                exits.add_metric([str(number), reason], count)
        yield exits
        expiry = GaugeMetricFamily(
            "rtservice_certificate_expiry_timestamp_seconds",
            "When the first of a listener's certificates expires, since the epoch.",
            labels=["listener"],
        )
        first: dict[str, float] = {}
        for one in figures["certificates"]:
            first[one["listener"]] = min(one["not_after"], first.get(one["listener"], one["not_after"]))
        for listener, when in first.items():
            expiry.add_metric([listener], when)
        yield expiry

    def _connections(self, workers: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
        labels = ["listener", "worker"]
        now = GaugeMetricFamily("rtservice_connections", "Connections now.", labels=[*labels, "phase"])
        opened = CounterMetricFamily("rtservice_connections_opened", "Connections accepted.", labels=labels)
        closed = CounterMetricFamily(
            "rtservice_connections_closed", "Connections ended, by why.", labels=[*labels, "reason"]
        )
        refused = CounterMetricFamily(
            "rtservice_connections_refused",
            "Connections closed as soon as accepted, by the setting that says so.",
            labels=[*labels, "reason"],
        )
        failed = CounterMetricFamily(
            "rtservice_handshake_failures",
            "Connections ended before their PROXY header and their TLS handshake were done.",
            labels=[*labels, "kind"],
        )
        received = CounterMetricFamily("rtservice_received_bytes", "Bytes received.", labels=labels)
        sent = CounterMetricFamily("rtservice_sent_bytes", "Bytes sent.", labels=labels)
        durations = HistogramMetricFamily(
            "rtservice_connection_duration_seconds", "How long connections lasted, at their end.", labels=labels
        )
        for worker, counters in workers:
            for listener, counts in counters["listeners"].items():
                where = [listener, worker]
                for phase, count in counts["phase"].items():
                    now.add_metric([*where, phase], count)
                opened.add_metric(where, counts["opened"])
                received.add_metric(where, counts["in"])
                sent.add_metric(where, counts["out"])
                for family, word in ((closed, "closed"), (refused, "refused"), (failed, "handshake_failed")):
                    for label, count in counts[word].items():
                        family.add_metric([*where, label], count)
                _add_histogram(durations, where, counts["duration"], self._source.durations)
        yield from (now, opened, closed, refused, failed, received, sent, durations)

    def _processes(self, workers: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
        lag = HistogramMetricFamily(
            "rtservice_reactor_lag_seconds", "How late the reactor calls what is due.", labels=["worker"]
        )
        for worker, counters in workers:
            _add_histogram(lag, [worker], counters["lag"], self._source.lags)
        yield lag
        words: tuple[tuple[str, type[CounterMetricFamily | GaugeMetricFamily], str, str], ...] = (
            ("cpu_seconds", CounterMetricFamily, "process_cpu_seconds", "User and system CPU time."),
            ("memory", GaugeMetricFamily, "process_resident_memory_bytes", "Resident memory."),
            ("descriptors", GaugeMetricFamily, "process_open_fds", "Open file descriptors."),
            ("descriptor_limit", GaugeMetricFamily, "process_max_fds", "Most file descriptors that may be open."),
            ("dropped", CounterMetricFamily, "log_records_dropped", "Log records that nobody took in time."),
        )
        for word, kind, name, text in words:
            family = kind(f"rtservice_{name}", text, labels=["worker"])
            for worker, counters in workers:
                family.add_metric([worker], counters.get(word, 0))
            yield family


def _protocol(workers: list[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    """What the hosted factory counts, by its own names: see IMetrics."""
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    taken: dict[str, str] = {}
    for worker, counters in workers:
        for name, count in counters["protocol"].items():
            # `x` and `x_total` are one name to Prometheus, which would refuse the whole scrape: a worker that has gone
            # mad may report the other one.
            if taken.setdefault(name.removesuffix("_total"), name) != name:
                continue
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            with suppress(ValueError):  # a worker that has gone mad: see figures
                family = families.setdefault(
                    name, kind(f"rtservice_protocol_{name}", "Counted by the hosted protocol.", labels=["worker"])
                )
                family.add_metric([worker], count)
    yield from families.values()


def _add_histogram(
    family: HistogramMetricFamily, labels: list[str], counted: dict[str, Any], bounds: tuple[float, ...]
) -> None:
    names = [*map(str, bounds), "+Inf"]
    family.add_metric(labels, list(zip(names, accumulate(counted["buckets"]), strict=True)), counted["seconds"])
