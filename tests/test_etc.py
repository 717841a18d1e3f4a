"""The files in etc/ are what systemd accepts, and start what this package installs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rtservice.tap import Options

ETC = Path(__file__).parent.parent / "etc"


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze (Debian: systemd) is not installed"
)
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path) -> None:
    for unit in ("rtservice.service", "rtservice.socket"):
        text = (ETC / unit).read_text()
        # The one thing that is not on this machine is the installed program.
        (tmp_path / unit).write_text(text.replace("/opt/rtservice/bin/twistd", shutil.which("true") or "/bin/true"))
    units = [str(tmp_path / unit) for unit in ("rtservice.service", "rtservice.socket")]
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60
    )
    # Units of the host itself may be complained about; ours must not.
    ours = [line for line in result.stderr.splitlines() if "rtservice" in line]
    assert ours == []
    assert result.returncode == 0, result.stderr


def test_the_service_is_started_with_options_that_exist() -> None:
    command = re.search(r"^ExecStart=(.*)$", (ETC / "rtservice.service").read_text(), re.MULTILINE)
    assert command is not None
    arguments = command[1].split()
    options = Options()
    options.parseOptions(arguments[arguments.index("rtservice") + 1 :])
    assert options.settings().listen == ("systemd:name=rtservice",)
