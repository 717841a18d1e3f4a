"""``python -m benchmarks``: measure, print tables, and write files."""

import argparse
import functools
import importlib.util
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report
from benchmarks.build import UnavailableError
from benchmarks.cases import CASES
from benchmarks.measure import Bench, Result, Row, choose_cores, raise_descriptor_limit
from benchmarks.servers import SERVERS, Certificate, make_certificate

# About ten minutes for all cases and servers. Three rounds are the minimum for a median.
ROUNDS, SECONDS = 3, 2.5
QUICK_ROUNDS, QUICK_SECONDS = 1, 0.5


class Progress:
    """Prints each finished run and the remaining time on standard error."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._rewrites = sys.stderr.isatty()

    def ran(self, case: str, row: Row, number: int) -> None:
        """Print the run that has ended."""
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._total - self._done) / 60
        figures = row.rounds[-1]
        found = f"{figures.cost:.2f}" if figures else "n/a"
        line = f"[{self._done}/{self._total}] {case}, round {number + 1}: {row.server.title} {found}"
        before, after = ("\r\x1b[K", "") if self._rewrites else ("", "\n")
        print(f"{before}{line}, {left:.1f} min left", end=after, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Clear the line before a table is printed."""
        if self._rewrites:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    about = "Compare rtservice with other servers in one run."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about)
    parser.add_argument("--cases", metavar="NAME,…", default=[], type=_names, help="only these cases")
    parser.add_argument("--servers", metavar="NAME,…", default=[], type=_names, help="only these servers")
    parser.add_argument("--rounds", type=int, help=f"runs of each server in each case (default: {ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"measured time of a run (default: {SECONDS:g})")
    parser.add_argument("--quick", action="store_true", help=f"one round of {QUICK_SECONDS:g} s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG into FILE (needs matplotlib)")
    parser.add_argument("--list", action="store_true", help="list cases and servers, and exit")
    options = parser.parse_args()
    for given, known in ((options.cases, CASES), (options.servers, SERVERS)):
        names = [entry.name for entry in known]
        if unknown := [name for name in given if name not in names]:
            parser.error(f"unknown name {', '.join(unknown)}; accepted are {', '.join(names)}")
    if options.rounds is None:
        options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.seconds is None:
        options.seconds = QUICK_SECONDS if options.quick else SECONDS
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be above 0")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; pip install 'rtservice[benchmarks]'")
    return options


def main() -> int:
    """Run the command line, and return the exit status."""
    options = parse()
    if options.list:
        for kind, known in (("cases", CASES), ("servers", SERVERS)):
            print(f"{kind}:", *(f"  {entry.name:<19} {entry.title}" for entry in known), sep="\n")
        return 0
    if sys.platform != "linux":
        print("benchmarks: Linux only (needs epoll, /proc and CPU affinity)", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: servers are stopped
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="rtservice-benchmarks-") as directory:
        bench = prepare(options, Path(directory))
        try:
            measure(options, bench, results)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            status = 130
        else:
            status = 0
    if table := report.summary_table(results):
        print(table)
    if options.json:
        text = json.dumps(report.as_json(bench, results), indent=1, ensure_ascii=False)
        options.json.write_text(f"{text}\n")
    if options.plot and results:
        from benchmarks.plot import draw

        draw(results, options.plot)
    return status


def prepare(options: argparse.Namespace, directory: Path) -> Bench:
    """Create what all runs need, and print the machine, versions and parameters."""
    cores = choose_cores()
    certificate: Certificate | str
    try:
        certificate = make_certificate(directory)
    except UnavailableError as reason:
        certificate = str(reason)
    print(report.machine())
    print(", ".join(f"{name} {version}" for name, version in report.versions().items()))
    print(f"server on CPU {cores.server}, load on CPU {cores.load}")
    print(f"rounds: {options.rounds}, each with {options.seconds:g} s per server")
    print(*(f"{mark} {meaning}" for mark, meaning in report.LEGEND.items()), sep="\n")
    if cores.shared:
        print("server and load share one core: rates and latencies are not meaningful")
    print(flush=True)
    return Bench(cores, options.seconds, options.rounds, directory, certificate, raise_descriptor_limit())


def measure(options: argparse.Namespace, bench: Bench, results: list[Result]) -> None:
    """Measure the selected cases, and print the table of each when it is complete."""
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    servers = [server for server in SERVERS if not options.servers or server.name in options.servers]
    taking_part = {case: [server for server in servers if case.takes(server)] for case in cases}
    progress = Progress(sum(map(len, taking_part.values())) * options.rounds)
    for case in filter(taking_part.get, cases):
        result = bench.measure(case, taking_part[case], functools.partial(progress.ran, case.name))
        results.append(result)
        progress.clear()
        print(report.case_table(result), end="\n\n", flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
