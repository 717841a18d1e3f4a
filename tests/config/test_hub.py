"""The settings of the hub: one of two ways to give its URL, and no secrets in any output."""

from __future__ import annotations

import pytest

from rtservice.config.render import as_toml, shown_settings
from rtservice.config.schema import Settings, changes
from rtservice.config.sources import load_settings
from rtservice.config.values import HUB_URL, SettingError

SECRET = "redis://user:hunter2@redis.example.com:6379/3"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("redis://localhost", "redis://localhost"),
        (SECRET, "redis://<hidden>@redis.example.com:6379/3"),
        ("rediss://:hunter2@h?prefix=hunter2", "rediss://<hidden>@h?<hidden>"),
        ("redis://h?prefix=x", "redis://h?<hidden>"),
        ("redis+sentinel://a,b/m?sentinel_password=hunter2", "redis+sentinel://a,b/m?<hidden>"),
        ("redis+unix://:hunter2@/run/redis.sock", "redis+unix://<hidden>@/run/redis.sock"),
    ],
)
def test_a_url_is_accepted_and_shown_without_its_secrets(url: str, shown: str) -> None:
    loaded = load_settings({"hub": url}, {}, None)
    assert loaded.settings.hub == url
    assert shown_settings(loaded.settings, ())["hub"] == shown
    assert f'hub = "{shown}"  # command line' in as_toml(loaded, ())
    assert "hunter2" not in as_toml(loaded, ()) + repr(loaded) + repr(loaded.settings)


@pytest.mark.parametrize(
    "url",
    ["hunter2", "http://hunter2", "redis://hunter2@h", "redis://u:hunter2@h:x", "redis://u:hunter2/@h", "redis://"],
)
def test_an_invalid_url_is_rejected_without_its_text(config, url: str) -> None:
    given = ((({"hub": url}, {}, None), "--hub: "), (({}, {"RTSERVICE_HUB": url}, None), "RTSERVICE_HUB: "))
    for sources, where in (*given, (({}, {}, config(f'hub = "{url}"')), "rt.toml: hub: ")):
        with pytest.raises(SettingError) as caught:
            load_settings(*sources)
        assert where in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_another_type_is_rejected_without_its_value(config) -> None:
    with pytest.raises(SettingError, match=r"hub: a number is not a URL such as redis://localhost:6379/0"):
        load_settings({}, {}, config("hub = 12345"))


def test_the_placeholder_of_printed_settings_is_rejected(config) -> None:
    for url in (SECRET, "redis://h?prefix=x"):
        printed = as_toml(load_settings({"hub": url}, {}, None), ())
        assert "<hidden>: may be a secret" in printed
        with pytest.raises(SettingError, match="hub: <hidden> is the placeholder of --print-config"):
            load_settings({}, {}, config(printed))


def test_printed_settings_without_secrets_are_read_back(config) -> None:
    for given in ({"hub": "redis://h/1"}, {"hub-file": "/run/hub"}, {}):
        loaded = load_settings(given, {}, None)
        assert load_settings({}, {}, config(as_toml(loaded, ()))).settings == loaded.settings


@pytest.mark.parametrize(
    ("command_line", "variables", "file", "hub", "hub_file"),
    [
        ({"hub": "redis://a"}, {}, "hub-file = 'f'", "redis://a", ""),
        ({"hub-file": "f"}, {"RTSERVICE_HUB": "redis://a"}, "", "", "f"),
        ({}, {"RTSERVICE_HUB_FILE": "f"}, "hub = 'redis://a'", "", "f"),
        # An empty value decides nothing about the other setting.
        ({}, {"RTSERVICE_HUB": ""}, "hub-file = 'f'", "", "f"),
        ({"hub-file": ""}, {}, "hub-file = 'f'", "", ""),
        ({"hub-file": "", "hub": "redis://a"}, {}, "", "redis://a", ""),
    ],
)
def test_the_highest_source_with_a_url_or_a_file_decides(config, command_line, variables, file, hub, hub_file) -> None:
    loaded = load_settings(command_line, variables, config(file))
    assert (loaded.settings.hub, loaded.settings.hub_file) == (hub, hub_file)
    for name, value in (("hub", hub), ("hub-file", hub_file)):
        assert not value or loaded.sources[name] != "default"


@pytest.mark.parametrize(
    ("command_line", "variables", "file", "problem"),
    [
        ({"hub": SECRET, "hub-file": "f"}, {}, "", "--hub-file: cannot be combined with --hub; give one of them"),
        (
            {},
            {"RTSERVICE_HUB": SECRET, "RTSERVICE_HUB_FILE": "f"},
            "",
            "RTSERVICE_HUB_FILE: cannot be combined with RTSERVICE_HUB; give one of them",
        ),
        (
            {},
            {},
            f"hub = '{SECRET}'\nhub-file = 'f'",
            "rt.toml: hub-file: cannot be combined with hub; give one of them",
        ),
    ],
)
def test_one_source_cannot_give_both_url_and_file(config, command_line, variables, file, problem) -> None:
    with pytest.raises(SettingError) as caught:
        load_settings(command_line, variables, config(file))
    assert str(caught.value).endswith(problem)


def test_variables_that_kubernetes_sets_for_a_service_named_hub_are_ignored() -> None:
    variables = {"RTSERVICE_HUB_SERVICE_HOST": "10.0.0.1", "RTSERVICE_HUB_PORT": "tcp://10.0.0.1:6379"}
    assert load_settings({}, variables, None).settings == Settings()


def test_a_url_needs_a_restart_and_readiness_a_reload() -> None:
    new = Settings(hub=SECRET, hub_required=True)
    assert changes(Settings(), new) == (("hub-required",), ("hub",))


def test_the_kind_of_a_url_has_no_repr_with_a_value() -> None:
    assert HUB_URL.show is not None
    assert "hunter2" not in repr(Settings(hub=SECRET))
