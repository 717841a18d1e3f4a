"""Secret options in real processes: their sources, and their absence from every output."""

import json
import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.commands import RTSERVICE
from tests.support.hosted import copy_hosted, copy_plugin
from tests.support.listen_options import TCP
from tests.support.processes import children

STATUS = "--status=tcp:0"
with_and_without_workers = pytest.mark.parametrize("workers", [1, 2])


# No output may contain these.
LITERAL, FILED, CARRIED, NEWER = (f"hunter2-{word}" for word in ("literal", "filed", "carried", "newer"))


@pytest.fixture(autouse=True)
def keeper(tmp_path: Path, environment: dict[str, str]) -> None:
    copy_hosted("keeper", tmp_path)
    environment["PYTHONPATH"] = str(tmp_path)


def options_received(running) -> dict[str, object]:
    with running.connect() as client, client.makefile("rb") as lines:
        return json.loads(lines.readline())


def assert_no_secret_logged(running) -> None:
    shown = [line for line in running.lines if "hunter2" in line]
    assert not shown, shown


def response(running, path: str) -> str:
    port = running.wait_event("status.listening")["listener"].rpartition(":")[2]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:  # /metrics, if its extra is not installed
        return error.read().decode()


@with_and_without_workers
def test_a_secret_reaches_the_protocol_and_appears_in_no_output(service, tmp_path, workers) -> None:
    (tmp_path / "pw").write_text(f"{FILED}\n")
    (tmp_path / "rt.toml").write_text(f"[protocol]\nname = 'keeper:Keeper'\npassword = '@pw'\ntext = '{LITERAL}'\n")
    running = service(
        *("--config=rt.toml", TCP, STATUS, f"--workers={workers}", "--log-level=debug,twisted=debug"),
        RTSERVICE_PROTOCOL_OPTION=json.dumps(["raw=$CARRIED", "number=7"]),
        CARRIED=CARRIED,
    )
    given = options_received(running)
    assert (given["password"], given["text"], given["raw"]) == (FILED, LITERAL, CARRIED)
    # Child processes of the protocol would inherit it.
    assert given["environment"] == []
    running.wait_line("made with <hidden>")
    settings = json.loads(response(running, "/status.json"))["settings"]
    assert settings["protocol-option"] == "password, text, raw, number"
    assert not any("hunter2" in response(running, path) for path in ("/", "/status.json", "/metrics", "/nowhere"))
    for pid in children(running.process.pid):
        assert b"hunter2" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"RTSERVICE_PROTOCOL_OPTION" not in Path(f"/proc/{pid}/environ").read_bytes()
    # The log of a reload.
    (tmp_path / "rt.toml").write_text(f"[protocol]\nname = 'keeper:Keeper'\npassword = '{NEWER}'\ntext = 'x'\n")
    running.reload()
    running.wait_event("settings.need_restart", settings="protocol-option")
    (tmp_path / "rt.toml").write_text(
        f"[protocol]\nname = 'keeper:Keeper'\npassword = 'x'\nnumber = '{NEWER}'\n'{NEWER}"
    )
    assert running.reload()["event"] == "reload.failed"
    assert running.stop() == 0
    assert_no_secret_logged(running)


def test_new_workers_get_the_current_content_of_the_file(service, tmp_path) -> None:
    (tmp_path / "pw").write_text(FILED)
    running = service("--protocol=keeper:Keeper", "--protocol-option=password=@pw", TCP, "--workers=2")
    assert options_received(running)["password"] == FILED
    (tmp_path / "pw").write_text(NEWER)
    assert running.reload()["event"] == "reload.done"
    assert options_received(running)["password"] == NEWER
    (tmp_path / "pw").unlink()
    problem = running.reload()["problem"]
    assert problem.startswith("--protocol keeper:Keeper: option password: cannot read the file")
    assert f"'{tmp_path}/pw': no such file or directory" in problem
    assert options_received(running)["password"] == NEWER
    assert running.stop() == 0
    assert_no_secret_logged(running)


def test_a_single_process_keeps_the_content_from_its_start(service, tmp_path) -> None:
    (tmp_path / "pw").write_text(FILED)
    running = service("--protocol=keeper:Keeper", "--protocol-option=password=@pw", TCP)
    (tmp_path / "pw").unlink()
    assert running.reload()["event"] == "reload.done"
    assert options_received(running)["password"] == FILED


@with_and_without_workers
def test_a_relative_path_starts_in_the_directory_of_the_command(service, tmp_path, workers) -> None:
    (tmp_path / "pw").write_text(FILED)
    (tmp_path / "elsewhere").mkdir()
    running = service(
        *("--protocol=keeper:Keeper", "--protocol-option=password=@pw", TCP, f"--workers={workers}"),
        twistd=("--rundir=elsewhere",),
    )
    assert options_received(running)["password"] == FILED
    running.reload()
    assert options_received(running)["password"] == FILED


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user")
def test_a_file_of_root_is_read_before_privileges_are_dropped(service, tmp_path) -> None:
    (tmp_path / "pw").write_text(FILED)
    (tmp_path / "pw").chmod(0o600)
    running = service("--protocol=keeper:Keeper", "--protocol-option=password=@pw", TCP, twistd=("--uid=nobody",))
    assert options_received(running)["password"] == FILED


@pytest.mark.parametrize(("workers", "text"), [(1, "@@pw"), (2, "$$PW"), (2, "@@@pw"), (1, "a b"), (2, "'\"")])
def test_any_text_reaches_the_protocol(service, workers, text) -> None:
    running = service(
        *("--protocol=keeper:Keeper", TCP, f"--workers={workers}"),
        RTSERVICE_PROTOCOL_OPTION=json.dumps([f"password={text}", f"text={text}"]),
    )
    expected = text[1:] if text[:2] in ("@@", "$$") else text
    given = options_received(running)
    assert (given["password"], given["text"]) == (expected, expected)


@pytest.mark.parametrize(
    ("workers", "daemon", "check"),
    [(1, False, []), (2, True, []), (2, False, ["--check"])],
    ids=["single-process", "daemon-workers", "check-workers"],
)
@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("password=@pw", "option password: cannot read the file '{0}/pw': no such file or directory"),
        ("password=$PW", "option password: the environment variable PW is not set"),
    ],
)
def test_a_missing_file_or_variable_is_one_error_line(run, tmp_path, workers, daemon, check, option, problem) -> None:
    twistd = ["--pidfile=d.pid", "--logfile=d.log"] if daemon else ["-n", "--pidfile="]
    result = run(
        *(*twistd, "rtservice", "--protocol=keeper:Keeper", f"--protocol-option={option}", "--listen=unix:s"),
        *(f"--workers={workers}", *check),
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"rtservice: --protocol keeper:Keeper: {problem.format(tmp_path)}\n"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("workers", "check"), [(1, []), (2, []), (2, ["--check"])], ids=["single-process", "workers", "check"]
)
@pytest.mark.parametrize(
    ("protocol", "options", "problem"),
    [
        ("keeper:Keeper", ["password=x", f"number={LITERAL}"], "option number: the value is not a whole number"),
        ("keeper:Keeper", ["password=x", "number=@pw"], "option number: the value is not a whole number"),
        ("keeper:Keeper", ["password=x", f"raw={LITERAL}\\q"], "option raw: the value has an unknown escape"),
        ("keeper:fails", [f"password={LITERAL}"], "cannot log in with <hidden>"),
        ("keeper:fails", ["password=$CARRIED"], "cannot log in with <hidden>"),
        ("keeper:Keeper", [f"password={LITERAL}", f"nothing={LITERAL}"], "no option 'nothing'"),
        ("echo", ["max-message=@pw"], "option max-message: the value is not a whole number"),
    ],
)
def test_an_error_message_hides_the_invalid_value(
    run, tmp_path, environment, workers, check, protocol, options, problem
) -> None:
    (tmp_path / "pw").write_text(FILED)
    environment["CARRIED"] = CARRIED
    given = [f"--protocol-option={option}" for option in options]
    result = run(*RTSERVICE, f"--protocol={protocol}", *given, "--port=0", f"--workers={workers}", *check)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert problem in line
    assert "hunter2" not in result.stdout + result.stderr


def test_printed_settings_hide_secrets_and_are_rejected_until_they_are_filled_in(run, tmp_path) -> None:
    # No file is read.
    options = [f"--protocol-option={option}" for option in (f"text={LITERAL}", "password=@no/such", "raw=$NO_SUCH")]
    printed = run(*RTSERVICE, "--protocol=keeper:Keeper", *options, "--print-config")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert "hunter2" not in printed.stdout
    assert 'protocol-option = ["text=<hidden>", "password=@no/such", "raw=$NO_SUCH"]  # command line; <hidden>: ' in (
        printed.stdout
    )
    (tmp_path / "again.toml").write_text(printed.stdout)
    again = run(*RTSERVICE, "--config=again.toml", "--check")
    assert again.returncode == 1
    (line,) = again.stderr.splitlines()
    assert (
        "again.toml: protocol-option: number 1 of 3: text=<hidden>: <hidden> is the placeholder of --print-config"
        in line
    )


def test_a_key_in_a_description_of_another_type_appears_in_no_output(service, run, tmp_path) -> None:
    copy_plugin("keyed_endpoint", tmp_path)
    running = service(f"--listen=keyed:0:key={LITERAL}", STATUS)
    line = running.wait_event("listener.listening", listener=re.compile(r"^keyed:0:key=<hidden> \("))["listener"]
    port = re.search(r"127\.0\.0\.1.*?(\d+)\)", line)
    assert port is not None
    with socket.create_connection(("127.0.0.1", int(port[1])), timeout=30) as client:
        assert client.recv(100) == b"Hello from the server!"
        assert "keyed:0:key=<hidden>" in response(running, "/status.json")
        assert "hunter2" not in response(running, "/status.json") + response(running, "/metrics")
    running.wait_event("connection.closed", listener="keyed:0:key=<hidden>")
    running.stop()
    assert_no_secret_logged(running)
    result = run(*RTSERVICE, f"--listen=keyed:none:key={LITERAL}")
    assert result.returncode == 1
    assert "--listen keyed:none:key=<hidden>: not a usable endpoint description: no port, but <hidden>" in result.stderr
    assert "hunter2" not in result.stdout + result.stderr
