"""systemd and Prometheus accept the files in etc/; the units run the service with few privileges."""

import re
import shlex
import shutil
import subprocess
import tomllib

import pytest

from rtservice.config.schema import all_settings
from rtservice.config.sources import load_settings
from rtservice.hosting.aliases import ALIASES
from rtservice.tap import Options
from tests.support.repository import ETC

SERVICES = ["rtservice.service", "rtservice-standalone.service"]
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze (Debian: systemd) is not installed"
)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


@needs_systemd
def test_systemd_accepts_the_units(tmp_path) -> None:
    units = []
    for unit in (*SERVICES, "rtservice.socket"):
        text = (ETC / unit).read_text()
        # The installed program does not exist on this machine.
        (tmp_path / unit).write_text(text.replace("/opt/rtservice/bin/twistd", shutil.which("true") or "/bin/true"))
        units.append(str(tmp_path / unit))
    result = analyze("verify", "--man=no", *units)
    # systemd may also warn about units of this machine.
    ours = [line for line in result.stderr.splitlines() if "rtservice" in line]
    assert ours == []
    assert result.returncode == 0, result.stderr


@needs_systemd
@pytest.mark.parametrize(("unit", "most"), [("rtservice.service", 0.5), ("rtservice-standalone.service", 1.5)])
def test_the_exposure_level_of_a_unit_is_low(unit, most) -> None:
    result = analyze("security", "--offline=true", "--no-pager", str(ETC / unit))
    level = re.search(r"Overall exposure level for \S+: (\d+\.\d)", result.stdout)
    assert level is not None, result.stderr
    assert float(level[1]) <= most, result.stdout


@pytest.mark.parametrize(
    ("unit", "listen"), [("rtservice.service", ("systemd:name=rtservice",)), ("rtservice-standalone.service", ())]
)
def test_the_options_and_the_config_file_of_a_unit_are_valid(unit, listen) -> None:
    text = (ETC / unit).read_text().replace("/etc/rtservice/rtservice.toml", str(ETC / "rtservice.toml"))
    command = re.search(r"^ExecStart=(.*)$", text.replace("\\\n", ""), re.MULTILINE)
    assert command is not None
    arguments = shlex.split(command[1])
    options = Options()
    options.parseOptions(arguments[arguments.index("rtservice") + 1 :])
    assert options.settings().listen == listen
    assert options.settings().port == 8080


def test_the_systemd_stop_timeout_is_longer_than_the_drain_timeout() -> None:
    drain = tomllib.loads((ETC / "rtservice.toml").read_text())["drain-timeout"]
    for unit in SERVICES:
        timeout = re.search(r"^TimeoutStopSec=(\d+)$", (ETC / unit).read_text(), re.MULTILINE)
        assert timeout is not None
        assert int(timeout[1]) == drain + 15


def test_a_commented_setting_of_the_example_shows_the_default(tmp_path) -> None:
    text = (ETC / "rtservice.toml").read_text()
    hidden = "\n".join(line.removeprefix("#") for line in text.splitlines() if re.match("#[a-z0-9-]+ = ", line))
    (tmp_path / "hidden.toml").write_text(hidden)
    defaults = load_settings({}, {}, None, ALIASES).settings
    assert load_settings({}, {}, str(tmp_path / "hidden.toml"), ALIASES).settings == defaults
    # The example lists every setting.
    shown = {*tomllib.loads(hidden), *tomllib.loads(text), "listen", "interface"}
    assert shown == {setting.name for setting in all_settings(ALIASES)}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
@pytest.mark.parametrize(("what", "file"), [("rules", "rtservice.rules.yml"), ("config", "prometheus.yml")])
def test_prometheus_accepts_the_alerts_and_the_scrape_configuration(what: str, file: str) -> None:
    checked = subprocess.run(["promtool", "check", what, ETC / file], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
