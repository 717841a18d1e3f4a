"""Run the load generator: ``load.c`` if it can be compiled, otherwise ``fallback.py``, which is slower."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from benchmarks.build import UnavailableError, c_program
from benchmarks.cases import Case
from benchmarks.servers import GREETING, ROOT, Running

WARM_UP_SECONDS = 0.3
# Opening thousands of connections takes long on a slow server. A run is aborted after this time.
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Load:
    """A load generator."""

    command: list[str]
    remark: str | None
    """A note about its figures for the report, or None."""


def find(*, tls: bool) -> Load:
    """Return the fastest load generator that is available."""
    try:
        if not tls:
            return Load([str(c_program("load.c"))], None)
        return Load([str(c_program("load.c", "-DWITH_TLS", "-lssl", "-lcrypto"))], None)
    except UnavailableError as reason:
        command = [sys.executable, "-m", "benchmarks.fallback"]
        kind = "TLS load" if tls else "load"
        return Load(command, f"the {kind} generator is the one in Python, and may limit the figures: {reason}")


def run(load: Load, case: Case, server: Running, cpu: int, seconds: float) -> dict[str, Any]:
    """Run the load of a case against a running server, on the core `cpu`, and return the JSON of load.c.

    Raises `UnavailableError` if the load generator fails.
    """
    options = {
        "--mode": case.mode,
        "--connections": case.connections,
        "--size": case.size,
        "--greeting": GREETING.decode(),
        "--seconds": seconds,
        "--warmup": WARM_UP_SECONDS,
        "--publishers": case.publishers,
    }
    command = [*load.command, *(text for name, value in options.items() for text in (name, str(value)))]
    command += [text for port in server.ports for text in ("--port", str(port))]
    command += [text for pid in server.pids for text in ("--pid", str(pid))]
    command += [text for pid in server.engine_pids for text in ("--engine-pid", str(pid))]
    if case.tls:
        command.append("--tls")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    try:
        output, errors = process.communicate(timeout=seconds + PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"the load did not end within {seconds + PATIENCE_SECONDS:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"load: exited with status {process.returncode}"]
        raise UnavailableError(lines[-1])
    answer: dict[str, Any] = json.loads(output)
    return answer
