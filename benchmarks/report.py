"""Report the figures: tables for the terminal, and JSON."""

import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Bench, Figures, Result, Row

# Above these shares of a core, the load generator may be the limit, or other programs may have disturbed the run.
LOAD_IS_BUSY = 0.9
STRANGERS_DISTURB = 0.1

LEGEND = {
    "!": f"the load generator was more than {LOAD_IS_BUSY:.0%} busy, and may limit rate and latency",
    "~": f"other programs used more than {STRANGERS_DISTURB:.0%} of one of the two cores",
}

Figure = Callable[[Figures], float | None]
"""Selects one figure of a run."""


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure over the rounds."""

    median: float
    low: float
    high: float


def over_rounds(row: Row, figure: Figure) -> Spread | None:
    """Return median and range of a figure of a row."""
    return _spread(figure(figures) for figures in row.rounds if figures)


def ratio(subject: Row, peer: Row, figure: Figure) -> Spread | None:
    """Return median and range of the subject's figure divided by the peer's of the same round."""
    quotients = []
    for own, other in zip(subject.rounds, peer.rounds, strict=True):
        if own and other and (dividend := figure(own)) is not None and (divisor := figure(other)):
            quotients.append(dividend / divisor)
    return _spread(quotients)


def subject_of(result: Result) -> Row | None:
    """Return the row of rtservice in one process, to which ratios refer, or None if it was not measured."""
    return next((row for row in result.rows if row.server.name == result.case.subject and any(row.rounds)), None)


def case_table(result: Result) -> str:
    """Return the table of a case: a line for each measured server, and for each failed one the reason."""
    unit = result.case.unit
    subject = subject_of(result)
    cost = result.case.cost

    def compared(row: Row, figure: Figure) -> Spread | None:
        return ratio(subject, row, figure) if subject and row is not subject else None

    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("ready ms", lambda row: _median(over_rounds(row, _ready))),
        ("memory MiB", lambda row: _median(over_rounds(row, _memory), 1)),
        (f"{unit}/s", lambda row: _median(over_rounds(row, _rate))),
        ("p50 µs", lambda row: _median(over_rounds(row, _p50))),
        ("p99", lambda row: _median(over_rounds(row, _p99))),
        ("p99.9", lambda row: _median(over_rounds(row, _p999))),
        (f"{cost}/{unit}", lambda row: _median(over_rounds(row, _cost), 2)),
        ("range", lambda row: _range(over_rounds(row, _cost))),
        ("Redis CPU µs", lambda row: _median(over_rounds(row, _engine), 2)),
        (f"{cost} rtservice/peer", lambda row: _median(compared(row, _cost), 2)),
        ("range", lambda row: _range(compared(row, _cost))),
        ("p50 rtservice/peer", lambda row: _median(compared(row, _p50), 2)),
        ("server busy", lambda row: _share(over_rounds(row, _server_busy))),
        ("load busy", lambda row: _share(over_rounds(row, _load_busy))),
        ("", _marks),
    ]
    measured = [row for row in result.rows if any(row.rounds)]
    lines = _aligned(columns, measured)
    for row in result.rows:
        if row.missing is not None:
            lines.append(f"{row.server.title:<20} n/a: {row.missing}")
    return "\n".join([result.case.title, *lines, *result.remarks])


def summary_table(results: list[Result]) -> str:
    """The ratio of the steady figure to each peer, case by case."""
    compared = [result for result in results if subject_of(result)]
    if not compared:
        return ""
    # In the order of their first case. Not every case has all peers.
    peers = dict.fromkeys(
        row.server for result in compared for row in result.rows if row.server.name != result.case.subject
    )

    def cell(result: Result, name: str) -> str:
        subject = subject_of(result)
        rows = [row for row in result.rows if row.server.name == name]
        return _median(ratio(subject, rows[0], _cost), 2) if subject and rows else ""

    headings = ["", *(peer.name for peer in peers)]
    grid = [[result.case.name, *(cell(result, peer.name) for peer in peers)] for result in compared]
    title = "rtservice / peer: server CPU (idle: memory), median of the rounds' ratios; lower is better"
    return "\n".join([title, *_grid(headings, grid)])


def as_json(bench: Bench, results: list[Result]) -> dict[str, Any]:
    """Return all runs, medians and ratios, with the machine and versions."""
    return {
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "cores": asdict(bench.cores),
        "cases": [_case_json(result) for result in results],
    }


def machine() -> str:
    """Return the processor and the kernel in one line."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"


def versions() -> dict[str, str]:
    """Return the versions of the compared programs that are installed."""
    found = {"Python": platform.python_version()}
    for distribution in ("rtservice", "Twisted", "uvloop", "pyOpenSSL", "redis"):
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    commands = {
        "Go": "go version",
        "Node": "node --version",
        "cc": "cc --version",
        "Redis": "redis-server --version",
    }
    for name, command in commands.items():
        program, argument = command.split()
        if path := shutil.which(program):
            output = subprocess.run([path, argument], capture_output=True, text=True, check=False).stdout
            numbers = re.findall(r"\d+\.\d+\.\d+", output)
            found[name] = numbers[0] if numbers else output.partition("\n")[0]
    return found


def _case_json(result: Result) -> dict[str, Any]:
    subject = subject_of(result)
    figures = {field: _picker(field) for field in Figures.__dataclass_fields__}
    servers = {}
    for row in result.rows:
        servers[row.server.name] = {
            "title": row.server.title,
            "missing": row.missing,
            "rounds": [asdict(figures) if figures else None for figures in row.rounds],
            "over_rounds": {name: _json(over_rounds(row, figure)) for name, figure in figures.items()},
            "rtservice_ratio": {
                name: _json(ratio(subject, row, figures[name]))
                for name in ("cost", "p50", "rate")
                if subject is not None
            },
        }
    about = asdict(result.case) | {"unit": result.case.unit}
    about["cost_is"] = "KiB resident" if result.case.mode == "idle" else f"server {result.case.cost}"
    return about | {"servers": servers, "remarks": result.remarks}


def _picker(field: str) -> Figure:
    def pick(figures: Figures) -> float | None:
        value: float | None = getattr(figures, field)
        return value

    return pick


_cost, _rate, _p50, _p99, _p999 = map(_picker, ("cost", "rate", "p50", "p99", "p999"))
_server_busy, _load_busy, _strangers = map(_picker, ("server_busy", "load_busy", "strangers"))
_ready, _memory, _engine = map(_picker, ("ready", "memory", "engine"))


def _spread(figures: Iterable[float | None]) -> Spread | None:
    known = [figure for figure in figures if figure is not None]
    return Spread(statistics.median(known), min(known), max(known)) if known else None


def _json(spread: Spread | None) -> dict[str, float] | None:
    return asdict(spread) if spread else None


def _marks(row: Row) -> str:
    load, strangers = over_rounds(row, _load_busy), over_rounds(row, _strangers)
    marks = "!" if load and load.median > LOAD_IS_BUSY else ""
    return marks + ("~" if strangers and strangers.median > STRANGERS_DISTURB else "")


def _median(spread: Spread | None, digits: int = 0) -> str:
    return f"{spread.median:,.{digits}f}" if spread else ""


def _range(spread: Spread | None) -> str:
    return f"{spread.low:.2f}–{spread.high:.2f}" if spread and spread.low != spread.high else ""


def _share(spread: Spread | None) -> str:
    return f"{spread.median:.0%}" if spread else ""


def _aligned(columns: list[tuple[str, Callable[[Row], str]]], rows: list[Row]) -> list[str]:
    """Return the lines of a table without its empty columns."""
    cells = [(heading, [cell(row) for row in rows]) for heading, cell in columns]
    filled = [(heading, column) for heading, column in cells if any(column)]
    grid = [[row.server.title, *(column[i] for _, column in filled)] for i, row in enumerate(rows)]
    return _grid(["", *(heading for heading, _ in filled)], grid)


def _grid(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table, with the first column left-aligned and the others right-aligned."""
    if not rows:
        return []
    # A heading of two words takes two lines, which keeps columns narrow.
    halves = [_halves(heading) for heading in headings]
    lines = [[first for first, _ in halves], [second for _, second in halves], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for cells in lines:
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        aligned.append("  ".join([cells[0].ljust(max(widths[0], 20)), *others]).rstrip())
    return [line for line in aligned if line]


def _halves(heading: str) -> tuple[str, str]:
    first, _, second = heading.rpartition(" ")
    return first, second
