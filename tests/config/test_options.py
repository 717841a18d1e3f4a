"""The command line: generated from the schema, with errors of one line."""

import pytest
from twisted.scripts.twistd import ServerOptions

from rtservice.config.values import (
    SettingError,
)
from rtservice.startup.reload import CurrentSettings
from rtservice.tap import Options
from tests.support.settings import alias, make_settings


def test_the_command_line_is_generated_from_the_schema() -> None:
    options = Options()
    options.parseOptions(["-p", "0", "-i", "::1", "--greeting=", "--backlog=7", "--watch-certificates"])
    current = options.settings()
    assert (current.port, current.interface, current.backlog) == (0, "::1", 7)
    assert alias(current, "greeting") == b""
    assert current.watch_certificates is True
    options = Options()
    options.parseOptions(["-l", "tcp:1", "--listen", "unix:/x"])
    assert options.settings().listen == ("tcp:1", "unix:/x")


def test_without_options_all_settings_are_defaults() -> None:
    options = Options()
    options.parseOptions([])
    assert options.settings() == make_settings()
    assert not options["check"]


def test_the_config_option_takes_precedence_over_the_environment(config, tmp_path, monkeypatch) -> None:
    (tmp_path / "other.toml").write_text("backlog = 2")
    monkeypatch.setenv("RTSERVICE_CONFIG", config("backlog = 1"))
    for arguments, backlog in (([], 1), (["--config", str(tmp_path / "other.toml")], 2)):
        options = Options()
        options.parseOptions(arguments)
        assert options.settings().backlog == backlog
    with pytest.raises(SystemExit, match="--config: the value is empty"):
        Options().parseOptions(["--config="])


def test_a_reload_reads_the_same_file_from_any_working_directory(config, tmp_path, monkeypatch) -> None:
    config("backlog = 1\nmax-connections = 1")
    monkeypatch.setenv("RTSERVICE_MAX_MESSAGE", "5")
    monkeypatch.chdir(tmp_path)
    options = Options()
    options.parseOptions(["--config=rt.toml", "--max-connections=9"])
    monkeypatch.chdir("/")
    monkeypatch.delenv("RTSERVICE_MAX_MESSAGE")
    config("backlog = 2\nmax-connections = 2")
    again = options.source.read().settings
    assert (again.backlog, again.max_connections, alias(again, "max-message")) == (2, 9, 5)
    assert options.settings().backlog == 1
    config("backlog = 'x'")
    with pytest.raises(SettingError, match=r"rt\.toml: backlog: 'x' is not a whole number"):
        options.source.read()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--port", "70000"], "--port: '70000'"),
        (["--nonsense"], "nonsense"),
        (["--framing", "xml"], "--framing: 'xml' is not one of raw, line, netstring, int32"),
        (["--listen="], "--listen: the value is empty"),
        (["--watch-certificates=no"], "watch-certificates"),
        (["surplus"], "'surplus'"),
        (["--protocol-option=password=my", "hunter2"], "unexpected argument, not shown as it may be a secret"),
        (["--protocol-option=hunter2"], "--protocol-option: not of the form key=value; the text is not"),
        (["--password=hunter2"], "option --password not recognized"),
    ],
)
def test_an_error_is_one_line_with_the_setting_and_its_value(arguments: list[str], names: str) -> None:
    with pytest.raises(SystemExit) as caught:
        Options().parseOptions(arguments)
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--draintimeout=3", "; did you mean --drain-timeout?"),
        ("--drain_timeout=3", "; did you mean --drain-timeout?"),
        ("--ports=3", "; did you mean --port?"),
        ("--protocol-options=a=b", "; did you mean --protocol-option?"),
        ("--logfile=x", "; put --logfile before the word rtservice"),
        ("--nodaemon", "; put --nodaemon before the word rtservice"),
        ("-n", "; put -n before the word rtservice"),
        ("--pidflie=x", "; did you mean --pidfile? Put it before the word rtservice"),
        ("--no_save", "; did you mean --no-save? Put it before the word rtservice"),
        ("--zzzzzz", ""),
        ("-Z", ""),
    ],
)
def test_an_unknown_option_suggests_a_known_one(option: str, hint: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(SystemExit) as caught:
        ServerOptions().parseOptions(["rtservice", option])
    assert str(caught.value) == f"rtservice: option {name} not recognized{hint} (see twistd rtservice --help)"
    with pytest.raises(SystemExit, match=f"option {name} not recognized"):
        Options().parseOptions([option])


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        ([], set()),
        (["--status=9090"], set()),
        (["--status=*:9090"], set()),
        (["--status=tcp:9090:interface=*"], set()),
        (["--status=Status.Example.com.:9090"], {"status.example.com"}),
        (["--status=tcp:web:9090", "--status-host=a,b"], {"web", "a", "b"}),
        (["--status=*:9090", "--status-host=*"], {"*"}),
    ],
)
def test_the_host_name_of_the_status_description_is_allowed(arguments, hosts) -> None:
    """`*` in a description means every address, and allows no name: an attacker can point a name at an address."""
    options = Options()
    options.parseOptions(arguments)
    assert CurrentSettings(options.loaded, options.source, resolve_path=str).status_hosts() == hosts
