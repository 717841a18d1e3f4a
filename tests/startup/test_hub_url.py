"""The URL of the hub from a setting or a file, and what the log has about it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from twisted.logger import LogPublisher

from rtservice.config.sources import LoadedSettings, load_settings
from rtservice.config.values import SettingError
from rtservice.hub.local import LocalCarrier
from rtservice.observe.logs import Levels, Log
from rtservice.startup.hub_url import carrier_of_process, hub_url, warn_of_visible_password

SECRET = "redis://:hunter2@redis.example.com"


def load(**given: str) -> LoadedSettings:
    return load_settings({name.replace("_", "-"): text for name, text in given.items()}, {}, None)


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def log(events) -> Log:
    return Log(Levels({}), LogPublisher(events.append))


def test_the_url_is_the_setting_or_the_content_of_the_file(tmp_path) -> None:
    assert hub_url(load(), "/") == ""
    assert hub_url(load(hub=SECRET), "/") == SECRET
    for end in ("", "\n", "\r\n", "\n\n"):
        (tmp_path / "hub").write_text(f"{SECRET}{end}")
        assert hub_url(load(hub_file="hub"), str(tmp_path)) == SECRET
        assert hub_url(load(hub_file=str(tmp_path / "hub")), "/") == SECRET


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read the file '{0}/hub': no such file or directory"),
        ("", "the file '{0}/hub' is empty; it must contain the URL of the hub"),
        (" \n", "the file '{0}/hub' is empty; it must contain the URL of the hub"),
        ("hunter2", "the file '{0}/hub': the URL of the hub must begin with redis://, "),
        (f"{SECRET}\n{SECRET}", "the file '{0}/hub': the URL of the hub has a "),
        ("redis://u:hunter2@h:x", "the file '{0}/hub': the port of the hub is not a number from 1 to 65535"),
        ("redis://<hidden>@h", "the file '{0}/hub': <hidden> is the placeholder of --print-config"),
    ],
)
def test_an_unusable_file_is_an_error_with_its_path_and_without_its_content(tmp_path, content, problem) -> None:
    if content is not None:
        (tmp_path / "hub").write_text(content)
    with pytest.raises(SettingError) as caught:
        hub_url(load(hub_file="hub"), str(tmp_path))
    assert str(caught.value).startswith(f"--hub-file: {problem.format(tmp_path)}")
    assert "hunter2" not in str(caught.value)


def test_without_a_url_the_hub_is_local(log) -> None:
    assert isinstance(carrier_of_process(load(), "", log), LocalCarrier)


@pytest.mark.parametrize("given", [{"hub": SECRET}, {"hub_file": "f"}])
def test_a_missing_library_is_an_error_with_the_command_that_installs_it(monkeypatch, log, given) -> None:
    monkeypatch.setitem(sys.modules, "hiredis", None)
    with pytest.raises(SettingError) as caught:
        carrier_of_process(load(**given), SECRET, log)
    (setting,) = given
    assert str(caught.value) == (
        f"--{setting.replace('_', '-')}: the hub on Redis needs the package hiredis: pip install 'rtservice[redis]'"
    )


def test_a_file_that_the_url_names_is_checked(tmp_path, log) -> None:
    pytest.importorskip("hiredis")
    with pytest.raises(SettingError, match=r"^--hub: ") as caught:
        carrier_of_process(load(hub="redis://h"), f"rediss://:hunter2@h?cafile={tmp_path}/none", log)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", [SECRET, "redis+sentinel://h/m?sentinel_password=hunter2"])
def test_a_password_on_the_command_line_is_logged_as_a_warning(log, events, url) -> None:
    warn_of_visible_password(load(hub=url), log)
    (event,) = events
    assert event["event"] == "hub.password_visible"
    assert "hunter2" not in str(event)


@pytest.mark.parametrize(
    "loaded",
    [load(), load(hub="redis://h"), load(hub_file="f"), load_settings({}, {"RTSERVICE_HUB": SECRET}, None)],
    ids=["default", "no password", "file", "environment"],
)
def test_other_urls_are_not_logged(log, events, loaded) -> None:
    warn_of_visible_password(loaded, log)
    assert events == []
