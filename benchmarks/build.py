"""Compiles what is written in C and Go, once, into a cache directory outside the source tree."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent


class UnavailableError(Exception):
    """A server, a load or a measurement cannot be had here; the text says why, in one line."""


@functools.cache
def cache_directory() -> Path:
    """Where compiled programs are kept: the user's cache, or a temporary place if that cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rtservice-benchmarks"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    else:
        if os.access(cache, os.W_OK | os.X_OK):
            return cache
    return Path(tempfile.mkdtemp(prefix="rtservice-benchmarks-"))


def c_program(source: str, *flags: str) -> Path:
    """The program made from a C file of this package. Raises `UnavailableError`."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UnavailableError("no C compiler (cc, gcc or clang) on PATH")
    return _build(source, [compiler, "-O2"], flags)


def go_program(source: str) -> Path:
    """The program made from a Go file of this package. Raises `UnavailableError`."""
    go = shutil.which("go")
    if go is None:
        raise UnavailableError("no go on PATH")
    return _build(source, [go, "build"], ())


def _build(source: str, compiler: list[str], flags: tuple[str, ...]) -> Path:
    path = SOURCES / source
    recipe = repr((compiler, flags)).encode() + path.read_bytes()
    program = cache_directory() / f"{path.stem}-{path.suffix[1:]}-{hashlib.sha256(recipe).hexdigest()[:16]}"
    if program.exists():
        return program
    half_made = program.with_name(f"{program.name}.{os.getpid()}")
    command = [*compiler, "-o", str(half_made), str(path), *flags]
    environment = {"GOCACHE": str(cache_directory() / "go"), "GO111MODULE": "off"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        half_made.unlink(missing_ok=True)
        said = done.stderr.splitlines() or ["it said nothing"]
        reason = next((line for line in said if "error" in line), said[-1]).strip()
        raise UnavailableError(f"{Path(compiler[0]).name} cannot build {source}: {reason}")
    half_made.replace(program)
    return program
