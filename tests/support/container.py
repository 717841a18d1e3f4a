"""Builds and runs a Containerfile without a container engine, on the root of this machine instead of a base image.

The instructions of a stage run in a chroot on an overlay of this machine's root, in a separate mount namespace: all but
`FROM` are executed. The result runs as process 1 of a PID and a network namespace, as the declared user, without
privileges, on a read-only root. This needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Takes the place of the base image's: the interpreter that the environment of the tests was created with.
PYTHON = Path(sys.base_prefix, "bin").resolve()

# Seconds for one instruction; installing the dependencies takes 15 on an idle machine.
BUILD_DEADLINE = 110


@dataclass
class Stage:
    """A stage of a Containerfile: its base image, its name, and its instructions."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        """Return the arguments of the last instruction of this kind; empty if there is none."""
        return next((text for kind, text in reversed(self.instructions) if kind == instruction), "")

    def command(self) -> list[str]:
        """Return the command of a container without arguments: `ENTRYPOINT` and `CMD`, as JSON arrays."""
        return [*json.loads(self.last("ENTRYPOINT")), *json.loads(self.last("CMD"))]


def stages_of(containerfile: str) -> list[Stage]:
    """Parse a Containerfile: Containerfile(5). Raises ValueError for a line that is no instruction."""
    lines = [line for line in containerfile.splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n"):
        if not line.strip():
            continue
        match = re.fullmatch(r"([A-Z]+) (.+)", line)
        if match is None:
            raise ValueError(f"no instruction: {line!r}")
        kind, text = match.groups()
        if kind == "FROM":
            base, _, name = text.partition(" AS ")
            stages.append(Stage(base, name))
        else:
            stages[-1].instructions.append((kind, text))
    return stages


class Builder:
    """Executes the instructions of the stages of a Containerfile. `context` is the directory of `COPY`."""

    def __init__(self, context: Path, directory: Path) -> None:
        self._context = context
        self._directory = directory
        # Keeps the mount namespace until its input is closed.
        script = f"mount -t tmpfs none {shlex.quote(str(directory))} && echo ready && read line"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise OSError("a mount namespace needs root")
        self.enter = ["nsenter", f"--target={self._holder.pid}", "--mount"]

    def close(self) -> None:
        """Remove all mounts."""
        self._holder.communicate()

    def root(self, stage: Stage) -> Path:
        """Return the root directory of a stage, in the namespace of `enter`."""
        return self._directory / (stage.name or "final") / "root"

    def build(self, stages: list[Stage]) -> None:
        """Build the stages. Raises AssertionError with the output of an instruction that fails."""
        for stage in stages:
            self._mount(self.root(stage))
            directory = "/"
            for kind, text in stage.instructions:
                if kind == "WORKDIR":
                    directory = text
                    self._run("mkdir", "-p", f"{self.root(stage)}{directory}")
                elif kind == "COPY":
                    self._copy(stage, directory, text)
                elif kind == "RUN":
                    self._run("chroot", str(self.root(stage)), *_SHELL, f"cd {directory} && {text}")
                elif kind not in ("USER", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"):
                    raise ValueError(f"{kind}: this instruction is not implemented")

    def _mount(self, root: Path) -> None:
        above = root.parent
        self._run("mkdir", "-p", f"{above}/upper", f"{above}/work", str(root))
        layers = f"lowerdir=/,upperdir={above}/upper,workdir={above}/work"
        self._run("mount", "-t", "overlay", "-o", layers, "overlay", str(root))
        for name in ("dev", "proc", "tmp"):
            self._run(
                *("mount", "-t", "tmpfs", "none") if name == "tmp" else ("mount", "--bind", f"/{name}"),
                f"{root}/{name}",
            )
        # The user of the container may not enter the directories of the interpreter, such as /root/.pyenv.
        for parent in PYTHON.parents:
            self._run("chmod", "a+rx", f"{root}{parent}")

    def _copy(self, stage: Stage, directory: str, text: str) -> None:
        words = text.split()
        source = self._context
        if words[0].startswith("--from="):
            source = self._directory / words.pop(0).removeprefix("--from=") / "root"
        *files, target = words
        place = f"{self.root(stage)}{Path(directory, target)}"
        if len(files) > 1 or target.endswith("/"):
            self._run("cp", "-a", *(f"{source}/{file}" for file in files), place)
        else:
            # The content of a directory, as COPY does.
            (file,) = files
            self._run("mkdir", "-p", str(Path(place).parent))
            self._run("cp", "-aT", f"{source}/{file}", place)

    def _run(self, *command: str) -> None:
        result = subprocess.run(
            [*self.enter, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_DEADLINE,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"

    def run_command(self, stage: Stage) -> list[str]:
        """Return the start of a command that runs another one as process 1 of a container of this stage."""
        user, _, group = stage.last("USER").partition(":")
        root = shlex.quote(str(self.root(stage)))
        # The namespaces of an engine, and the settings of etc/kubernetes/deployment.yaml.
        script = (
            f"ip link set lo up && mount -t proc proc {root}/proc && "
            f"mount -o remount,ro {root} && mount -o remount,ro {root}/tmp && exec chroot {root} "
            f"setpriv --reuid={user} --regid={group} --clear-groups --no-new-privs --bounding-set=-all "
            'env -i PATH=/usr/local/bin:/usr/bin:/bin "$@"'
        )
        namespaces = ("--pid", "--net", "--mount", "--ipc", "--uts", "--fork")
        return [*self.enter, "unshare", *namespaces, "sh", "-c", script, "sh"]


# The shell of `RUN`, with the registry settings of this machine's pip, if there are any.
_SHELL = (
    *("env", "-i", "HOME=/root", f"PATH={PYTHON}:/usr/local/bin:/usr/bin:/bin"),
    *(f"{name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")),
    *("/bin/sh", "-c"),
)


@contextlib.contextmanager
def builder(context: Path, directory: Path) -> Iterator[Builder]:
    """A Builder, which is closed at the end. Raises OSError if this machine does not permit namespaces."""
    created = Builder(context, directory)
    try:
        yield created
    finally:
        created.close()
