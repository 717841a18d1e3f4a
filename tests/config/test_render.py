"""Settings as text: --print-config reads back, and secrets are hidden."""

import tomllib

import pytest

from rtservice.config.render import as_toml, shown_settings
from rtservice.config.sources import LoadedSettings
from rtservice.config.values import (
    LEVELS,
    NETWORKS,
    SettingError,
)
from rtservice.hosting.names import SHIPPED
from tests.support.settings import SETTINGS, load, make_settings

HOSTED = ("limit=5", "password=hunter2", "key=@/run/secrets/key", "token=$TOKEN", "at=@@hunter2", "limit=6")


def test_only_the_names_of_hosted_protocol_options_are_shown() -> None:
    current = make_settings(protocol="mine:Factory", protocol_option=HOSTED)
    values = shown_settings(current, SHIPPED)
    assert values["protocol-option"] == "limit, password, key, token, at"
    assert "hunter2" not in repr(current) + repr(LoadedSettings(current, {}))
    for protocol in SHIPPED:
        current = make_settings(protocol=protocol, protocol_option=("greeting=hi",))
        assert shown_settings(current, SHIPPED)["protocol-option"] == "greeting=hi"


def test_printed_settings_hide_secrets_and_the_placeholder_is_rejected(config) -> None:
    printed = as_toml(load({"protocol": "mine:Factory", "protocol-option": HOSTED}, {}, None), SHIPPED)
    assert "hunter2" not in printed
    assert (
        'protocol-option = ["limit=<hidden>", "password=<hidden>", "key=@/run/secrets/key", "token=$TOKEN", '
        '"at=<hidden>", "limit=<hidden>"]  # command line; <hidden>: may be a secret\n'
    ) in printed
    with pytest.raises(
        SettingError, match=r"protocol-option: number 1 of 6: limit=<hidden>: <hidden> is the placeholder of --print-"
    ):
        load({}, {}, config(printed))


def test_options_of_shipped_protocols_are_printed() -> None:
    printed = as_toml(load({"protocol-option": ["greeting=hi"]}, {}, None), SHIPPED)
    assert 'protocol-option = ["greeting=hi"]  # command line\n' in printed


def test_arguments_of_other_listener_types_are_hidden(config) -> None:
    description = "onion:80:privateKey=hunter2:interface=::1".replace("::1", r"\:\:1")
    loaded = load({"listen": [description, "ssl:1:privateKey=/k"]}, {}, None)
    as_shown = shown_settings(loaded.settings, SHIPPED)["listen"]
    assert as_shown == r"onion:80:privateKey=<hidden>:interface=\:\:1,ssl:1:privateKey=/k"
    printed = as_toml(loaded, SHIPPED)
    assert "hunter2" not in printed + repr(loaded)
    assert "privateKey=/k" in printed
    with pytest.raises(SettingError, match="<hidden> is the placeholder of --print-config"):
        load({}, {}, config(printed))


@pytest.mark.parametrize(
    "current",
    [
        make_settings(),
        make_settings(
            port=0,
            interface="fe80::1%eth0",
            max_connections=7,
            idle_timeout=0.0,
            drain_timeout=0.00001,
            handshake_timeout=1234.5678901234567,
            watch_certificates=True,
            proxy_from=NETWORKS.parse("192.0.2.1,2001:db8::/32"),
            log_level=LEVELS.parse("critical,twisted.web=warn,x=debug"),
        ),
        make_settings(protocol="chat", protocol_option=("a=b 'c'", 'd="\\x00"')),
        make_settings(protocol="mine:Factory", protocol_option=("a=@/run/secrets/a", "b=$B")),
        make_settings(listen=("tcp:1", 'unix:/a "b" \\c\'\t\x7f\u202e\U0001f600', "x:#y")),
        *(
            make_settings(greeting=greeting)
            for greeting in (
                b"",
                bytes(range(256)),
                b'it\'s "quoted" \\x41 # no comment',
                "grüß \u2028 \U0001f600".encode(),
                b"a\\\r\n",
                b"\xf0\x9f\x98",
                b"'''\"\"\"",
            )
        ),
    ],
)
def test_printed_settings_read_back_to_the_same_settings(config, current) -> None:
    sources = {setting.name: "environment" for setting in SETTINGS}
    printed = as_toml(LoadedSettings(current, sources), SHIPPED)
    assert load({}, {}, config(printed)).settings == current
    assert all(line.endswith("  # environment") for line in printed.splitlines())


def test_printed_settings_name_their_sources(config, tmp_path) -> None:
    path = tmp_path / "odd\nname\udcff"
    path.write_text("max-connections = 5")
    printed = as_toml(load({"greet": "first-data"}, {"RTSERVICE_BACKLOG": "7"}, str(path)), SHIPPED)
    assert 'greet = "first-data"  # command line\n' in printed
    assert "backlog = 7  # environment\n" in printed
    assert rf"max-connections = 5  # {tmp_path}/odd\nname\udcff" + "\n" in printed
    assert "port = 8080  # default\n" in printed
    assert tomllib.loads(printed)["max-connections"] == 5


def test_printing_a_path_that_toml_cannot_represent_is_rejected() -> None:
    with pytest.raises(SettingError, match=r"'unix:/\\udcff' cannot be printed as TOML"):
        as_toml(load({"listen": ["unix:/\udcff"]}, {}, None), SHIPPED)
