"""The schema: every setting's text becomes a value, or an error that names the text; and the layers they come from."""

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
from twisted.scripts.twistd import ServerOptions

from rtservice.config.render import as_toml, shown_settings
from rtservice.config.schema import Settings, all_settings, changes
from rtservice.config.sources import LoadedSettings, load_settings
from rtservice.config.values import (
    ESCAPED,
    FLAG,
    HOSTS,
    LEVELS,
    NETWORKS,
    SettingError,
    as_text,
    either,
    seconds,
    whole_number,
)
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.names import SHIPPED
from rtservice.tap import Options, _Settings

SETTINGS = tuple(all_settings(ALIASES))


def load(command_line: Mapping[str, Any], environment: Mapping[str, str], config: str | None) -> LoadedSettings:
    """The settings of the command, aliases included."""
    return load_settings(command_line, environment, config, ALIASES)


def alias(settings: Settings, name: str) -> Any:
    """The value of an alias."""
    (value,) = (value for setting, value in settings.aliases.items() if setting.name == name)
    return value


def make_settings(**values: Any) -> Settings:
    """Settings with these values, and with the defaults for all others, aliases included."""
    of_aliases = {setting: values.pop(setting.field, setting.default) for setting in ALIASES}
    return Settings(**values, aliases=of_aliases)


@pytest.fixture
def config(tmp_path):
    """Writes a TOML file and gives its path."""

    def write(content: str | bytes) -> str:
        path = tmp_path / "rt.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


# --- kinds ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Hello", b"Hello"),
        ("", b""),
        (r"a\r\n", b"a\r\n"),
        (r"\x00\xfF\t\0\e\\n", b"\x00\xff\t\0\x1b\\n"),
        ("grüß", "grüß".encode()),
        ("\udcff", b"\xff"),  # a byte of the command line that is not UTF-8
    ],
)
def test_a_greeting_takes_escapes(text: str, value: bytes) -> None:
    assert ESCAPED.parse(text) == value


@pytest.mark.parametrize("text", [r"\q", r"\x1", r"\xzz", "end\\"])
def test_an_unknown_escape_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(SettingError, match="unknown escape"):
        ESCAPED.parse(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "11", "1.0", "1_0", " 5", "٣", "9" * 40])
def test_a_number_out_of_range_or_no_number_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="whole number from 0 to 10"):
        whole_number(0, 10).parse(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "0.09", "11", "1e0", "1.", ".5", "nan", "inf", "1 s", "9" * 40])
def test_a_time_out_of_range_or_no_number_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"number of seconds from 0\.1 to 10$"):
        seconds(0.1, 10).parse(text)


def test_a_word_may_stand_beside_numbers() -> None:
    kind = either("auto", None, whole_number(1, 9))
    assert kind.parse("auto") is None
    assert kind.parse("9") == 9
    with pytest.raises(SettingError, match="'Auto' is not auto or a whole number from 1 to 9"):
        kind.parse("Auto")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", ()),
        ("status.example.com", ("status.example.com",)),
        ("Web-1, rt_service.,xn--bcher-kva.example", ("web-1", "rt_service", "xn--bcher-kva.example")),
        ("*", ("*",)),
        ("127.0.0.1", ("127.0.0.1",)),
        ("::1, [2001:DB8::1],a", ("::1", "2001:db8::1", "a")),
    ],
)
def test_hosts_are_names_in_lower_case(text: str, hosts: tuple[str, ...]) -> None:
    assert HOSTS.parse(text) == hosts
    assert HOSTS.parse(as_text(hosts)) == hosts


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "a,",
        "a b",
        "a:80",
        "http://a",
        "[::1",
        "[a]",
        "[::1]:80",
        "*.example.com",
        "-a",
        "a..b",
        "b\xfccher.example",
        "a" * 64,
    ],
)
def test_what_is_no_host_name_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="is not a host name such as"):
        HOSTS.parse(text)


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("10.0.0.0/8", ["10.0.0.0/8"]),
        ("192.0.2.1", ["192.0.2.1/32"]),
        ("2001:db8::1", ["2001:db8::1/128"]),
        ("[2001:db8::1]", ["2001:db8::1/128"]),
        ("::1,[2001:db8::]/32", ["::1/128", "2001:db8::/32"]),
        ("127.0.0.0/8, ::1/128,0.0.0.0/0", ["127.0.0.0/8", "::1/128", "0.0.0.0/0"]),
    ],
)
def test_networks_are_addresses_with_and_without_a_prefix(text: str, networks: list[str]) -> None:
    assert NETWORKS.parse(text) == tuple(map(ipaddress.ip_network, networks))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a network"),
        ("10.0.0.0/8,", "'' is not a network"),
        ("5", "'5' is not a network"),
        ("localhost", "'localhost' is not a network"),
        ("[10.0.0.1]", "'[10.0.0.1]' is not a network"),
        ("[::1", "'[::1' is not a network"),
        ("10.0.0.0/33", "'10.0.0.0/33' is not a network"),
        ("10.0.0.0/8/8", "'10.0.0.0/8/8' is not a network"),
        ("fe80::1%eth0", "'fe80::1%eth0' is not a network"),
        ("127.0.0.1/8", "'127.0.0.1/8' has bits beyond its prefix: the network is 127.0.0.0/8"),
        ("2001:db8::1/64", "the network is 2001:db8::/64"),
    ],
)
def test_what_is_no_network_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingError, match=re.escape(problem)):
        NETWORKS.parse(text)


@pytest.mark.parametrize("text", ["", "1", "yes", "True"])
def test_a_flag_is_true_or_false(text: str) -> None:
    assert (FLAG.parse("true"), FLAG.parse("false")) == (True, False)
    with pytest.raises(SettingError, match=f"'{text}' is not true or false"):
        FLAG.parse(text)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_default_is_what_its_text_says(setting) -> None:
    if not setting.repeatable:
        assert setting.kind.parse(as_text(setting.default)) == setting.default


# --- layers ---


def test_the_command_line_is_over_the_environment_over_the_file_over_the_defaults(config) -> None:
    file = config("port = 1\nbacklog = 1\nmax-message = 1\n")
    loaded = load({"port": "3"}, {"RTSERVICE_PORT": "2", "RTSERVICE_BACKLOG": "2", "PORT": "x"}, file)
    current = loaded.settings
    assert (current.port, current.backlog) == (3, 2)
    assert (alias(current, "max-message"), alias(current, "framing")) == (1, "raw")
    assert loaded.sources["port"] == "command line"
    assert loaded.sources["backlog"] == "environment"
    assert loaded.sources["max-message"] == file
    assert loaded.sources["framing"] == "default"
    assert set(loaded.sources) == {setting.name for setting in SETTINGS}


def test_nothing_given_is_the_defaults() -> None:
    assert load({}, {}, None).settings == make_settings()


def test_a_file_has_toml_types_or_the_texts_of_the_command_line(config) -> None:
    natural = config(
        """
        max-connections = 1000
        idle-timeout = 0.5
        drain-timeout = 5
        watch-certificates = true
        listen = ["tcp:1", "tcp:2"]
        greeting = 'a\\r'
        """
    )
    current = load({}, {}, natural).settings
    assert (current.max_connections, current.idle_timeout, current.drain_timeout) == (1000, 0.5, 5.0)
    assert current.watch_certificates is True
    assert (current.listen, alias(current, "greeting")) == (("tcp:1", "tcp:2"), b"a\r")
    texts = config('max-connections = "auto"\nidle-timeout = "0.5"\nwatch-certificates = "true"\nlisten = "tcp:1"')
    current = load({}, {}, texts).settings
    assert (current.max_connections, current.idle_timeout, current.listen) == (None, 0.5, ("tcp:1",))
    assert current.watch_certificates is True


def test_a_variable_holds_several_descriptions_with_white_space_between_them() -> None:
    assert load({}, {"RTSERVICE_LISTEN": " tcp:1\n unix:/x "}, None).settings.listen == ("tcp:1", "unix:/x")


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("[::1]:8080", ("[::1]:8080",)),
        (" [2001:db8::1]:8080 tcp6:1:interface=::1", ("[2001:db8::1]:8080", "tcp6:1:interface=::1")),
        (r"[\:\:1]:8080", (r"[\:\:1]:8080",)),
        ('["[::1]:8080", "unix:/a b"]', ("[::1]:8080", "unix:/a b")),
        ("[]", ()),
    ],
)
def test_a_variable_may_begin_with_an_address_in_brackets(text, listen) -> None:
    assert load({}, {"RTSERVICE_LISTEN": text}, None).settings.listen == listen


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("port = true", "port: true is not a whole number from 0 to 65535"),
        ("port = 80.0", "port: 80.0 is not a whole number from 0 to 65535"),
        ("port = 70000", "port: '70000' is not a whole number from 0 to 65535"),
        ("port = [1]", "port: an array is not a whole number from 0 to 65535"),
        ("max-connections = 0", "max-connections: '0' is not auto or a whole number from 1 to 10000000"),
        ("max-connections = {}", "max-connections: a table is not auto or a whole number"),
        ("idle-timeout = 0.01", "idle-timeout: '0.01' is not 0 or a number of seconds from 0.1 to 10000000"),
        ("drain-timeout = nan", "drain-timeout: 'NaN' is not a number of seconds from 0 to 86400"),
        ("drain-timeout = 1979-05-27", "drain-timeout: 1979-05-27 is not a number of seconds"),
        ("greeting = 5", "greeting: 5 is not a string"),
        ("greet = false", "greet: false is not one of connect, first-data"),
        ("interface = 1", "interface: 1 is not a string"),
        ("watch-certificates = 1", "watch-certificates: 1 is not true or false"),
        ("protocol-option = [1234]", "protocol-option: a number is not a string such as"),
        ("protocol-option = [{password = 'hunter2'}]", "protocol-option: a table is not a string such as"),
        ("protocol-option = ['a=b', 'hunter2']", "protocol-option: number 2 of 2: not of the form key=value"),
        ("[protocol]\npassword = {hunter2 = 'hunter2'}", "protocol: password: a table is not a string or a number"),
        ("[protocol]\nname = ['hunter2']", "protocol: an array is not a string"),
        ("listen = 8080", "listen: a number is not a string, or an array of them"),
        ('listen = ["tcp:1", 2]', "listen: number 2 of 2: a number is not a string"),
        ('listen = [""]', "listen: the value is empty"),
        ('proxy-from = ["::1"]', "proxy-from: an array is not a string of networks"),
        (f"port = 0x{'f' * 5000}", "port: "),
        ("max_connections = 5", "max_connections: no such setting; did you mean max-connections?"),
        ("prot = 5", "prot: no such setting; did you mean port?"),
        ("[limits]\nmax = 1", "limits: no such setting"),
        ('"a\\nb" = 1', r"a\nb: no such setting"),
    ],
)
def test_a_mistake_in_a_file_names_file_setting_value_and_what_is_accepted(config, line, problem) -> None:
    file = config(line)
    with pytest.raises(SettingError, match=re.escape(f"{file}: {problem}")) as caught:
        load({}, {}, file)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("port = 1\nport = x", r"is not TOML: .*line 2, column 8"),
        ("port = 1\nport = 2", "is not TOML: "),
        (b"greeting = 'gr\xfc\xdf'", "is not UTF-8: line 1, the byte at offset 14$"),
        (b"port = 1\r\n# \xfc", "is not UTF-8: line 2, the byte at offset 12$"),
        ("port = 1".encode("utf-16"), "is UTF-16 by its byte order mark; save it as UTF-8$"),
        ("port = 1".encode("utf-32"), "is UTF-32 by its byte order mark; save it as UTF-8$"),
        ("port = 1".encode("utf-16-le"), r"is not TOML: .*line 1, column 2"),
        ("port = " + "9" * 5000, "is not TOML: "),
        ("port = " + "[" * 5000, "is not TOML: "),
    ],
)
def test_a_file_that_is_not_toml_is_named(config, content, problem) -> None:
    file = config(content)
    with pytest.raises(SettingError, match=re.escape(file) + ": " + problem) as caught:
        load({}, {}, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_is_read_as_any_editor_writes_it(config, encoding, end) -> None:
    current = load({}, {}, config(f"port = 1{end}# ü{end}greeting = 'ü'{end}".encode(encoding))).settings
    assert (current.port, alias(current, "greeting")) == (1, "ü".encode())


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SettingError, match=f"{re.escape(str(path))}: cannot be read: {reason}"):
            load({}, {}, str(path))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("RTSERVICE_MAX_CONNECTIONS", "x", "RTSERVICE_MAX_CONNECTIONS: 'x' is not auto or a whole number"),
        ("RTSERVICE_PROT", "1", "RTSERVICE_PROT: no such setting; did you mean RTSERVICE_PORT?"),
        ("RTSERVICE_port", "1", "RTSERVICE_port: no such setting; did you mean RTSERVICE_PORT?"),
        ("RTSERVICE_ZZZ", "1", "RTSERVICE_ZZZ: no such setting"),
        ("RTSERVICE_CHECK", "1", "RTSERVICE_CHECK: no such setting"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(name, value, problem) -> None:
    with pytest.raises(SettingError) as caught:
        load({}, {name: value}, None)
    assert str(caught.value).startswith(problem)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in problem)


def test_a_mistake_counts_also_where_a_higher_layer_gives_the_setting(config) -> None:
    with pytest.raises(SettingError, match="port"):
        load({"port": "1"}, {}, config("port = 'x'"))


def test_what_kubernetes_makes_of_a_service_of_this_name_is_no_setting(config) -> None:
    injected = {
        "RTSERVICE_SERVICE_HOST": "10.0.0.1",
        "RTSERVICE_SERVICE_PORT": "8080",
        "RTSERVICE_SERVICE_PORT_ECHO": "8080",
        "RTSERVICE_PORT": "tcp://10.0.0.1:8080",
        "RTSERVICE_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "RTSERVICE_PORT_8080_TCP_PROTO": "tcp",
        "RTSERVICE_PORT_8080_TCP_PORT": "8080",
        "RTSERVICE_PORT_8080_TCP_ADDR": "10.0.0.1",
        "RTSERVICE_BLUE_SERVICE_HOST": "10.0.0.1",
        "RTSERVICE_BLUE_PORT": "udp://10.0.0.1:8080",
        "RTSERVICE_BLUE_PORT_8080_UDP_ADDR": "10.0.0.1",
    }
    assert load({}, injected, None) == load({}, {}, None)
    assert load({}, {**injected, "RTSERVICE_PORT": "9000"}, None).settings.port == 9000
    for name, value in [("RTSERVICE_PORT", "tcp:1"), ("RTSERVICE_BLUE_PORT", "1"), ("RTSERVICE_SERVICE", "x")]:
        with pytest.raises(SettingError, match=name):
            load({}, {name: value}, None)


def test_a_setting_is_where_its_value_came_from(config) -> None:
    path = config("port = 1")
    loaded = load({"greeting": "x"}, {"RTSERVICE_AT_LIMIT": "reject"}, path)
    names = ("greeting", "at-limit", "port", "backlog")
    assert [loaded.where(name) for name in names] == ["--greeting", "RTSERVICE_AT_LIMIT", f"{path}: port", "--backlog"]


@pytest.mark.parametrize(
    ("command_line", "variables", "file", "listen", "port", "interface"),
    [
        ({"port": "9000"}, {}, "listen = 'tcp:1'", (), 9000, ""),
        ({"interface": "::1"}, {}, "listen = 'tcp:1'", (), 8080, "::1"),
        ({"listen": ["tcp:1"]}, {}, "port = 9000\ninterface = '::1'", ("tcp:1",), 8080, ""),
        ({"interface": "::1"}, {"RTSERVICE_PORT": "1"}, "listen = 'tcp:1'", (), 1, "::1"),
        ({"port": "1"}, {"RTSERVICE_LISTEN": "tcp:1"}, "interface = '::1'", (), 1, ""),
        ({"listen": ["tcp:2"]}, {"RTSERVICE_LISTEN": "tcp:1"}, "", ("tcp:2",), 8080, ""),
        ({}, {"RTSERVICE_LISTEN": ""}, "listen = 'tcp:1'", (), 8080, ""),
        ({}, {}, "listen = []\nport = 1", (), 1, ""),
    ],
)
def test_the_highest_layer_that_says_where_to_listen_is_followed(
    config, command_line, variables, file, listen, port, interface
) -> None:
    loaded = load(command_line, variables, config(file))
    current = loaded.settings
    assert (current.listen, current.port, current.interface) == (listen, port, interface)
    for name in ("listen", "port", "interface"):
        given = getattr(current, name) != getattr(make_settings(), name)
        assert not given or loaded.sources[name] != "default"


@pytest.mark.parametrize(
    ("command_line", "variables", "file", "problem"),
    [
        ({"listen": ["tcp:1"], "port": "1"}, {}, "", "--port: cannot be combined with --listen; give one of them"),
        (
            {},
            {"RTSERVICE_LISTEN": "tcp:1", "RTSERVICE_INTERFACE": "::1"},
            "",
            "RTSERVICE_INTERFACE: cannot be combined with RTSERVICE_LISTEN",
        ),
        ({}, {}, "listen = 'tcp:1'\nport = 1", r"rt\.toml: port: cannot be combined with listen"),
    ],
)
def test_one_layer_says_where_to_listen_in_one_way(config, command_line, variables, file, problem) -> None:
    with pytest.raises(SettingError, match=problem):
        load(command_line, variables, config(file))


# --- a protocol and its options ---


def test_a_table_of_the_file_has_the_protocol_and_its_options(config) -> None:
    file = config("[protocol]\nname = 'chat'\nmotd = 'a=b'\nrooms = ['x', 'y']\nlimit = 5\nopen = true\nrate = 1.5")
    loaded = load({}, {}, file)
    assert loaded.settings.protocol == "chat"
    assert loaded.settings.protocol_option == ("motd=a=b", "rooms=x", "rooms=y", "limit=5", "open=true", "rate=1.5")
    assert loaded.where("protocol") == f"{file}: protocol"
    assert load({}, {}, config("[protocol]\nmotd = 'x'")).settings.protocol == "echo"
    assert load({}, {}, config("protocol = 'x:y'\nprotocol-option = ['name=z']")).settings.protocol_option == (
        "name=z",
    )


def test_options_of_all_layers_hold_each_from_the_highest(config) -> None:
    loaded = load(
        {"protocol-option": ["rooms=3", "rooms=4"]},
        {"RTSERVICE_PROTOCOL_OPTION": "max-size=9 b=1"},
        config("[protocol]\nmax_size = 1\nrooms = ['1', '2', '5']\nlast = 1"),
    )
    assert loaded.settings.protocol_option == ("last=1", "max-size=9", "b=1", "rooms=3", "rooms=4")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[protocol]\nname = 5", "protocol: 5 is not a string"),
        ("[protocol]\nsize = {}", "protocol: size: a table is not a string or a number"),
        ("[protocol]\nsize = []", "protocol: size: an empty array; give at least one value"),
        ("[protocol]\nday = 2026-01-01", "protocol: day: a date or time is not a string or a number"),
        ("[protocol]\n'a b' = 1", "protocol: 'a b' is not an option name; accepted are letters, digits, - and _"),
        ("protocol-option = ['size']", "protocol-option: not of the form key=value; the text is not shown"),
        (
            "protocol-option = ['a=1']\n[protocol]\na = 1",
            "protocol-option: cannot be combined with a table",
        ),
    ],
)
def test_a_mistake_in_the_table_is_named(config, content, problem) -> None:
    file = config(content)
    with pytest.raises(SettingError, match=re.escape(f"{file}: {problem}")):
        load({}, {}, file)


# --- variables that hold several texts ---


@pytest.mark.parametrize(
    ("value", "options"),
    [
        ('["motd=hello all", "password=a b\\\\c\\"d"]', ("motd=hello all", 'password=a b\\c"d')),
        ('  ["a="]\n', ("a=",)),
        ("[]", ()),
        # Without the bracket as it always was: quotes and backslashes are characters of a value.
        (r"""a=b\x00 c='d'  e="f" """, (r"a=b\x00", "c='d'", 'e="f"')),
        ("a=[1] b=[", ("a=[1]", "b=[")),
    ],
)
def test_a_variable_has_options_with_blanks_as_a_json_array(value, options) -> None:
    assert load({}, {"RTSERVICE_PROTOCOL_OPTION": value}, None).settings.protocol_option == options


def test_a_variable_has_descriptions_with_blanks_as_a_json_array() -> None:
    loaded = load({}, {"RTSERVICE_LISTEN": '["unix:/run/a b", "tcp:1"]'}, None)
    assert loaded.settings.listen == ("unix:/run/a b", "tcp:1")


@pytest.mark.parametrize(
    "value", ["[", '["a=hunter2", ]', '["a=hunter2"] b=1', "[1]", '[["a=hunter2"]]', "[" * 100_000]
)
def test_a_variable_that_is_no_json_array_of_strings_is_refused_and_not_shown(value) -> None:
    with pytest.raises(SettingError) as caught:
        load({}, {"RTSERVICE_PROTOCOL_OPTION": value}, None)
    assert str(caught.value) == (
        "RTSERVICE_PROTOCOL_OPTION: begins with [ but is not a JSON array of strings; the text is not shown"
    )


def test_half_a_value_is_not_shown_and_its_place_is() -> None:
    with pytest.raises(SettingError) as caught:
        load({}, {"RTSERVICE_PROTOCOL_OPTION": "password=hunter2 and=1 more-of-hunter2"}, None)
    assert str(caught.value) == (
        "RTSERVICE_PROTOCOL_OPTION: number 3 of 3: not of the form key=value; the text is not shown"
    )


# --- what is shown ---


HOSTED = ("limit=5", "password=hunter2", "key=@/run/secrets/key", "token=$TOKEN", "at=@@hunter2", "limit=6")


def test_options_of_a_hosted_protocol_are_shown_by_their_names() -> None:
    current = make_settings(protocol="mine:Factory", protocol_option=HOSTED)
    values = shown_settings(current, SHIPPED)
    assert values["protocol-option"] == "limit, password, key, token, at"
    assert "hunter2" not in repr(current) + repr(LoadedSettings(current, {}))
    for protocol in SHIPPED:
        current = make_settings(protocol=protocol, protocol_option=("greeting=hi",))
        assert shown_settings(current, SHIPPED)["protocol-option"] == "greeting=hi"


def test_what_may_be_secret_is_marked_in_printed_settings_and_the_mark_is_refused(config) -> None:
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


def test_options_of_what_ships_are_printed_as_they_are() -> None:
    printed = as_toml(load({"protocol-option": ["greeting=hi"]}, {}, None), SHIPPED)
    assert 'protocol-option = ["greeting=hi"]  # command line\n' in printed


def test_arguments_of_other_listeners_are_hidden_wherever_they_are_shown(config) -> None:
    description = "onion:80:privateKey=hunter2:interface=::1".replace("::1", r"\:\:1")
    loaded = load({"listen": [description, "ssl:1:privateKey=/k"]}, {}, None)
    as_shown = shown_settings(loaded.settings, SHIPPED)["listen"]
    assert as_shown == r"onion:80:privateKey=<hidden>:interface=\:\:1,ssl:1:privateKey=/k"
    printed = as_toml(loaded, SHIPPED)
    assert "hunter2" not in printed + repr(loaded)
    assert "privateKey=/k" in printed
    with pytest.raises(SettingError, match="<hidden> is the placeholder of --print-config"):
        load({}, {}, config(printed))


# --- a file, a reload ---


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
def test_the_printed_settings_read_back_to_the_same(config, current) -> None:
    sources = {setting.name: "environment" for setting in SETTINGS}
    printed = as_toml(LoadedSettings(current, sources), SHIPPED)
    assert load({}, {}, config(printed)).settings == current
    assert all(line.endswith("  # environment") for line in printed.splitlines())


def test_the_printed_settings_say_where_each_came_from(config, tmp_path) -> None:
    path = tmp_path / "odd\nname\udcff"
    path.write_text("max-connections = 5")
    printed = as_toml(load({"greet": "first-data"}, {"RTSERVICE_BACKLOG": "7"}, str(path)), SHIPPED)
    assert 'greet = "first-data"  # command line\n' in printed
    assert "backlog = 7  # environment\n" in printed
    assert rf"max-connections = 5  # {tmp_path}/odd\nname\udcff" + "\n" in printed
    assert "port = 8080  # default\n" in printed
    assert tomllib.loads(printed)["max-connections"] == 5


def test_a_path_that_toml_cannot_hold_is_refused_when_printing() -> None:
    with pytest.raises(SettingError, match=r"'unix:/\\udcff' cannot be printed as TOML"):
        as_toml(load({"listen": ["unix:/\udcff"]}, {}, None), SHIPPED)


def test_a_change_takes_a_reload_or_a_restart_as_the_schema_says() -> None:
    old = make_settings(port=1, greeting=b"a")
    new = make_settings(port=1, greeting=b"b", max_connections=5, log_level=LEVELS.parse("warn"))
    assert changes(old, new) == (("max-connections", "log-level"), ("greeting",))
    assert changes(new, new) == ((), ())


# --- the command line ---


def test_the_command_line_is_made_from_the_schema() -> None:
    options = Options()
    options.parseOptions(["-p", "0", "-i", "::1", "--greeting=", "--backlog=7", "--watch-certificates"])
    current = options.settings()
    assert (current.port, current.interface, current.backlog) == (0, "::1", 7)
    assert alias(current, "greeting") == b""
    assert current.watch_certificates is True
    options = Options()
    options.parseOptions(["-l", "tcp:1", "--listen", "unix:/x"])
    assert options.settings().listen == ("tcp:1", "unix:/x")


def test_no_option_is_the_defaults() -> None:
    options = Options()
    options.parseOptions([])
    assert options.settings() == make_settings()
    assert not options["check"]


def test_the_file_is_the_one_of_the_command_line_or_else_of_the_environment(config, tmp_path, monkeypatch) -> None:
    (tmp_path / "other.toml").write_text("backlog = 2")
    monkeypatch.setenv("RTSERVICE_CONFIG", config("backlog = 1"))
    for arguments, backlog in (([], 1), (["--config", str(tmp_path / "other.toml")], 2)):
        options = Options()
        options.parseOptions(arguments)
        assert options.settings().backlog == backlog
    with pytest.raises(SystemExit, match="--config: the value is empty"):
        Options().parseOptions(["--config="])


def test_a_reload_reads_the_file_again_from_wherever_the_process_is(config, tmp_path, monkeypatch) -> None:
    config("backlog = 1\nmax-connections = 1")
    monkeypatch.setenv("RTSERVICE_MAX_MESSAGE", "5")
    monkeypatch.chdir(tmp_path)
    options = Options()
    options.parseOptions(["--config=rt.toml", "--max-connections=9"])
    monkeypatch.chdir("/")
    monkeypatch.delenv("RTSERVICE_MAX_MESSAGE")
    config("backlog = 2\nmax-connections = 2")
    again = options.reloaded().settings
    assert (again.backlog, again.max_connections, alias(again, "max-message")) == (2, 9, 5)
    assert options.settings().backlog == 1
    config("backlog = 'x'")
    with pytest.raises(SettingError, match=r"rt\.toml: backlog: 'x' is not a whole number"):
        options.reloaded()


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
def test_a_mistake_is_one_line_that_names_setting_and_value(arguments: list[str], names: str) -> None:
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
def test_an_option_that_does_not_exist_is_answered_with_the_one_that_was_meant(option: str, hint: str) -> None:
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
def test_the_status_server_is_asked_for_by_the_name_in_its_description(arguments, hosts) -> None:
    """`*` there is every address, and lets no name in: an attacker's could be pointed at one of them."""
    options = Options()
    options.parseOptions(arguments)
    assert _Settings(options, log=None).status_hosts() == hosts
