"""Run the commands of documentation pages: `pages.py BIN PAGE...`.

BIN is the `bin` directory of an environment with the wheel installed. Each page runs from top to bottom in an empty
directory, with BIN first on PATH. An HTML comment before a fenced block tells what to do with it:

- `<!-- file: NAME -->`: write the block to this file.
- `<!-- run -->`: run the block with bash; the exit status must be 0.
- `<!-- serve -->`: start the block, wait for "listening on" in its output, and leave it running. It gets SIGTERM before
  the next such block, or at the end of the page, and must exit with status 0.
- `<!-- session -->`: run each line after `$ `. The lines after it are its expected output, where `...` matches any
  text. After other output the command is repeated until a deadline, since logs and metrics appear with a delay.
- `<!-- stop -->`, without a block: stop the running service.
- `<!-- copy: PATH -->`, without a block: copy a file or directory of the source, for commands that a user runs in the
  source directory.
- `<!-- not run: REASON -->`: do not run the block.

A block of commands (sh, bash, console) without such a comment is an error, so that no command is missed. At the end the
script prints the number of blocks that were run and that were not, with the reasons.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

DEADLINE = 120  # seconds for one command
RETRY, RETRY_EVERY = 30, 0.2  # seconds for the expected output to appear

_BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>file|run|serve|session|not run)(?:: (?P<detail>.*?))? -->\n+)?"
    r"^(?P<fence>```+)(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^(?P=fence)$"
    r"|^<!-- (?P<stop>stop) -->$"
    r"|^<!-- copy: (?P<copy>\S+) -->$",
    re.MULTILINE | re.DOTALL,
)
_SOURCE = Path(__file__).resolve().parents[1]
_COMMANDS = {"sh", "bash", "shell", "console"}


class PageError(Exception):
    """A page is invalid, or the result of a command differs from the page."""


def expected_pattern(expected: str) -> re.Pattern[str]:
    """Return a pattern for the output of a session. `...` matches any text, also several lines if alone in its line."""
    parts = (".*?".join(map(re.escape, line.split("..."))) for line in expected.rstrip("\n").split("\n"))
    pattern = "\n".join("ANY_LINES" if part == ".*?" else f"(?-s:{part})" for part in parts)
    return re.compile(pattern.replace("ANY_LINES", ".*?") + r"\n?\Z", re.DOTALL)


def commands_of(session: str) -> list[tuple[str, str]]:
    """Return the commands of a session with their expected output. A backslash continues a command on the next line."""
    found: list[tuple[str, str]] = []
    continued = False
    for line in session.splitlines(keepends=True):
        if continued or line.startswith("$ "):
            if continued:
                found[-1] = (found[-1][0] + line, "")
            else:
                found.append((line[2:], ""))
            continued = line.endswith("\\\n")
        elif not found:
            raise PageError(f"a session begins with {line!r}; begin with a command after '$ '")
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


class Page:
    """Runs one page in a directory."""

    def __init__(self, path: Path, binaries: Path, directory: Path) -> None:
        self._path = path
        self._directory = directory
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self._environment = {**kept, "PATH": f"{binaries}:{kept['PATH']}", "PYTHONUNBUFFERED": "1"}
        self._serving: subprocess.Popen[str] | None = None
        self.ran: Counter[str] = Counter()
        self.not_run: list[str] = []

    def run(self) -> None:
        """Run every block. Raises PageError."""
        text = self._path.read_text()
        marks = len(re.findall(r"^<!-- (?:file|run|serve|session|not run|stop|copy)\b", text, re.MULTILINE))
        try:
            for match in _BLOCK.finditer(text):
                kind = match["stop"] or match["kind"] or (match["copy"] and "copy")
                if kind:
                    marks -= 1
                elif match["language"] in _COMMANDS:
                    raise PageError(f"a block of commands has no comment such as <!-- run -->:\n{match['text']}")
                else:
                    continue
                try:
                    self._do(kind, match["detail"] or match["copy"] or "", match["text"] or "")
                except subprocess.TimeoutExpired as error:
                    raise PageError(str(error)) from None
            if marks:
                raise PageError(f"{marks} comments are not followed by a block")
            self._stop()
            self._await_daemons()
        finally:
            self._clean_up()

    def _do(self, kind: str, detail: str, text: str) -> None:
        if kind == "not run":
            if not detail:
                raise PageError(f"<!-- not run --> has no reason:\n{text}")
            self.not_run.append(detail)
            return
        self.ran[kind] += 1
        if kind == "file":
            path = self._directory / detail
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif kind == "copy":
            source, path = _SOURCE / detail, self._directory / detail
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
            except OSError as error:
                raise PageError(f"copy: {error}") from None
        elif kind == "run":
            print(f"$ {text}", end="", flush=True)
            status, output = self._bash(text)
            print(output, end="", flush=True)
            if status:
                raise PageError(f"status {status}: {text}{output}")
        elif kind == "session":
            for command, expected in commands_of(text):
                self._expect(command, expected)
        elif kind == "serve":
            self._stop()
            self._serve(text)
        else:
            self._stop()

    def _bash(self, command: str) -> tuple[int, str]:
        # To a file: processes that a command leaves running would keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            result = subprocess.run(
                ["bash", "-euc", command],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=DEADLINE,
            )
            output.seek(0)
            return result.returncode, output.read()

    def _expect(self, command: str, expected: str) -> None:
        print(f"$ {command}", end="", flush=True)
        pattern, end = expected_pattern(expected), time.monotonic() + RETRY
        while True:
            status, output = self._bash(command)
            if pattern.fullmatch(output) and not status:
                print(output.rstrip("\n"), flush=True)
                return
            if not expected or time.monotonic() > end:
                raise PageError(f"status {status}: {command}expected:\n{expected}found:\n{output}")
            time.sleep(RETRY_EVERY)

    def _serve(self, text: str) -> None:
        print(f"$ {text}", end="", flush=True)
        # `exec` replaces the shell by the service, which then gets the signal.
        script = re.sub(r"^((?:\w+=\S+ )*)twistd", r"\1exec twistd", text, flags=re.MULTILINE)
        serving = self._serving = subprocess.Popen(
            ["bash", "-euc", script],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert serving.stdout is not None
        timer = threading.Timer(DEADLINE, serving.kill)
        timer.start()
        lines = ""
        try:
            while "listening on" not in lines.rpartition("\n")[0]:
                line = serving.stdout.readline()
                print(line, end="", flush=True)
                lines += line
                if not line:
                    raise PageError(f"the service did not start: {text}{lines}")
        finally:
            timer.cancel()
        threading.Thread(target=serving.stdout.read, daemon=True).start()

    def _stop(self) -> None:
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.terminate()
            if status := serving.wait(DEADLINE):
                raise PageError(f"the service exited with status {status}")

    def _daemons(self) -> list[int]:
        """Return the running processes that the page has started as daemons with a pidfile."""
        found = []
        for pidfile in self._directory.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                number = int(pidfile.read_text())
                os.kill(number, 0)
                found.append(number)
        return found

    def _await_daemons(self) -> None:
        """Wait until the daemons of the page have exited: the next page uses the same ports. Raises PageError."""
        end = time.monotonic() + RETRY
        while self._daemons():
            if time.monotonic() > end:
                raise PageError("the page leaves a daemon running")
            time.sleep(RETRY_EVERY)

    def _clean_up(self) -> None:
        """Kill remaining processes after a failure."""
        if self._serving is not None:
            self._serving.kill()
            self._serving.wait()
        for number in self._daemons():
            os.kill(number, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """Run the pages, and return the exit status."""
    binaries, pages = Path(arguments[0]).resolve(), [Path(name) for name in arguments[1:]]
    ran: Counter[str] = Counter()
    not_run: Counter[str] = Counter()
    failed = 0
    for path in pages:
        print(f"=== {path}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            page = Page(path, binaries, Path(directory))
            try:
                page.run()
            except PageError as problem:
                failed += 1
                print(f"{path}: FAILED: {problem}", file=sys.stderr, flush=True)
            ran += page.ran
            not_run.update(page.not_run)
        print(f"=== {path}: {page.ran.total()} blocks run in {time.monotonic() - began:.1f} s", flush=True)
    print(f"=== {len(pages)} pages: {ran.total()} blocks run ({', '.join(f'{n} {kind}' for kind, n in ran.items())})")
    print(f"=== not run: {not_run.total()}")
    for reason, count in not_run.items():
        print(f"    {count} × {reason}")
    if not ran:
        print("no block was run", file=sys.stderr)
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
