"""Compile the programs in C and Go, once, into a cache directory outside of the source tree."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent


class UnavailableError(Exception):
    """A server, load generator or measurement is not available. The text is the reason in one line."""


@functools.cache
def cache_directory() -> Path:
    """Return the directory for compiled programs: the user's cache, or a temporary one if that is not writable."""
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
    """Compile a C file of this package, and return the program. Raises `UnavailableError`."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UnavailableError("no C compiler (cc, gcc or clang) on PATH")
    return _build(source, [compiler, "-O2"], flags)


def go_program(source: str) -> Path:
    """Compile a Go file of this package, and return the program. Raises `UnavailableError`."""
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
    unfinished = program.with_name(f"{program.name}.{os.getpid()}")
    command = [*compiler, "-o", str(unfinished), str(path), *flags]
    environment = {"GOCACHE": str(cache_directory() / "go"), "GO111MODULE": "off"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        unfinished.unlink(missing_ok=True)
        lines = done.stderr.splitlines() or ["no error output"]
        reason = next((line for line in lines if "error" in line), lines[-1]).strip()
        raise UnavailableError(f"{Path(compiler[0]).name} cannot build {source}: {reason}")
    unfinished.replace(program)
    return program
