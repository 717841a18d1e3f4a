"""Settings from a file and the environment, in real processes."""

import socket

import pytest

from tests.support.commands import RTSERVICE


def test_printed_settings_can_be_read_back(run, tmp_path, environment) -> None:
    environment |= {"RTSERVICE_BACKLOG": "7", "RTSERVICE_GREETING": r"grüß\e", "PYTHONIOENCODING": "ascii"}
    (tmp_path / "rt.toml").write_text("max-connections = 5\n")
    printed = run(*RTSERVICE, "--config=rt.toml", "--print-config", "--listen=unix:s", "--greet=first-data")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert "backlog = 7  # environment\n" in printed.stdout
    assert f"max-connections = 5  # {tmp_path / 'rt.toml'}\n" in printed.stdout
    assert not (tmp_path / "s").exists()
    del environment["RTSERVICE_BACKLOG"], environment["RTSERVICE_GREETING"]
    (tmp_path / "again.toml").write_text(printed.stdout)
    again = run(*RTSERVICE, "--config=again.toml", "--print-config")
    assert [line.partition("  # ")[0] for line in again.stdout.splitlines()] == [
        line.partition("  # ")[0] for line in printed.stdout.splitlines()
    ]


@pytest.mark.parametrize("twistd", [("--nodaemon", "--pidfile="), ()], ids=["foreground", "daemon"])
def test_check_binds_nothing_and_reports_valid_settings(run, tmp_path, twistd) -> None:
    result = run(*twistd, "rtservice", "--check", "--listen=unix:s")
    assert (result.returncode, result.stdout, result.stderr) == (0, "rtservice: the configuration is valid\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "variables", "problem"),
    [
        ("port = 'http'", {}, "rt.toml: port: 'http' is not a whole number from 0 to 65535"),
        ("port = x", {}, "rt.toml: is not TOML: Invalid value (at line 1, column 8)"),
        ("prot = 1", {}, "rt.toml: prot: no such setting; did you mean port?"),
        ("", {"RTSERVICE_PORT": "http"}, "RTSERVICE_PORT: 'http' is not a whole number"),
        ("", {"RTSERVICE_CONFIG": ""}, "RTSERVICE_CONFIG: the value is empty"),
        ("framing = 'line'\ngreeting = 'a\\n'", {}, "line feed"),
        (
            "workers = 2\nlisten = ['stdio:']",
            {},
            "rt.toml: listen stdio:: the type does not support --workers; accepted are ",
        ),
    ],
)
@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "serve"])
def test_an_invalid_setting_is_one_error_line_and_a_non_zero_exit_status(
    run, tmp_path, environment, content, variables, problem, check
) -> None:
    (tmp_path / "rt.toml").write_text(content)
    environment |= {"RTSERVICE_CONFIG": "rt.toml", **variables}
    result = run(*RTSERVICE, *check)
    assert result.returncode == 1
    assert result.stdout == ""
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_command_line_overrides_the_file(service, tmp_path, read_all) -> None:
    (tmp_path / "rt.toml").write_text("listen = ['unix:s']\ngreeting = 'from the file'\n")
    running = service("--config=rt.toml", "--port=0", "--interface=127.0.0.1")
    with running.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"from the file"
    assert not (tmp_path / "s").exists()
