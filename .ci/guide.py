"""Does what the README's guide says, literally, in an empty directory: `guide.py README.md BIN`, BIN having the wheel.

A comment before each block says what it is: a file to be written, a command that serves, one to run, or one to run
while that serves. The line of a block that follows `$ ` is run, and what follows it is what has to come back.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

DEADLINE = 120

readme, binaries = Path(sys.argv[1]).read_text(), Path(sys.argv[2]).resolve()
blocks = re.findall(r"<!-- guide: (\w+) ?(\S*) -->\n+```\w*\n(.*?)```\n", readme, re.DOTALL)
assert [what for what, _, _ in blocks].count("serve") >= 2, "the guide has gone from the README"
environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
environment["PATH"] = f"{binaries}:{environment['PATH']}"
serving: subprocess.Popen[str] | None = None


def stop() -> None:
    """End what serves; it has to drain and to end well."""
    global serving
    if serving is not None:
        serving.terminate()
        assert serving.wait(DEADLINE) == 0, "what was served did not end well"
        serving = None


with tempfile.TemporaryDirectory() as directory:

    def run(command: str) -> str:
        print(f"$ {command}", flush=True)
        result = subprocess.run(
            ["bash", "-euc", command], cwd=directory, env=environment, capture_output=True, text=True, timeout=DEADLINE
        )
        print(result.stdout, result.stderr, sep="", flush=True)
        assert result.returncode == 0, f"status {result.returncode}"
        return result.stdout

    try:
        for what, name, text in blocks:
            if what == "file":
                (Path(directory) / name).parent.mkdir(exist_ok=True)
                (Path(directory) / name).write_text(text)
            elif what == "run":
                stop()
                run(text)
            elif what == "serve":
                stop()
                print(f"$ {text}", flush=True)
                # A shell that becomes the service, so that it is the one to be stopped.
                script = re.sub(r"^((?:\w+=\S+ )*)twistd", r"\1exec twistd", text, flags=re.MULTILINE)
                serving = subprocess.Popen(
                    ["bash", "-euc", script], cwd=directory, env=environment, stdout=subprocess.PIPE, text=True
                )
                assert serving.stdout is not None
                while "listening on" not in (line := serving.stdout.readline()):
                    print(line, end="", flush=True)
                    assert line, "it ended"
                threading.Thread(target=serving.stdout.read, daemon=True).start()
            elif what == "talk":
                command, _, expected = text.removeprefix("$ ").partition("\n")
                assert run(command) == expected
            else:
                raise AssertionError(f"a block of no known kind: {what}")
        stop()
    finally:
        if serving is not None:
            serving.kill()
print("the guide holds")
