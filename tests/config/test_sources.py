"""Settings from the command line, the environment and a file: precedence, and errors that name the source."""

import re

import pytest

from rtservice.config.values import (
    SettingError,
)
from tests.support.settings import SETTINGS, alias, load, make_settings


def test_precedence_is_command_line_environment_file_default(config) -> None:
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


def test_without_any_source_all_settings_are_defaults() -> None:
    assert load({}, {}, None).settings == make_settings()


def test_a_file_accepts_toml_types_and_command_line_texts(config) -> None:
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


def test_a_variable_may_have_several_descriptions_separated_by_whitespace() -> None:
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
def test_an_error_in_a_file_names_file_setting_value_and_accepted_values(config, line, problem) -> None:
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
def test_an_error_names_a_file_that_is_not_toml(config, content, problem) -> None:
    file = config(content)
    with pytest.raises(SettingError, match=re.escape(file) + ": " + problem) as caught:
        load({}, {}, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_any_line_end_are_accepted(config, encoding, end) -> None:
    current = load({}, {}, config(f"port = 1{end}# ü{end}greeting = 'ü'{end}".encode(encoding))).settings
    assert (current.port, alias(current, "greeting")) == (1, "ü".encode())


def test_an_error_names_a_file_that_cannot_be_read(tmp_path) -> None:
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
def test_an_error_in_the_environment_names_the_variable(name, value, problem) -> None:
    with pytest.raises(SettingError) as caught:
        load({}, {name: value}, None)
    assert str(caught.value).startswith(problem)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in problem)


def test_an_invalid_value_is_reported_even_if_another_source_takes_precedence(config) -> None:
    with pytest.raises(SettingError, match="port"):
        load({"port": "1"}, {}, config("port = 'x'"))


def test_variables_that_kubernetes_sets_are_ignored(config) -> None:
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


def test_an_error_can_name_the_source_of_each_setting(config) -> None:
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
def test_the_highest_source_with_a_listen_setting_decides_where_to_listen(
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
def test_one_source_cannot_give_both_listen_and_port(config, command_line, variables, file, problem) -> None:
    with pytest.raises(SettingError, match=problem):
        load(command_line, variables, config(file))


# --- options of the protocol ---


def test_a_table_in_the_file_sets_the_protocol_and_its_options(config) -> None:
    file = config("[protocol]\nname = 'chat'\nmotd = 'a=b'\nrooms = ['x', 'y']\nlimit = 5\nopen = true\nrate = 1.5")
    loaded = load({}, {}, file)
    assert loaded.settings.protocol == "chat"
    assert loaded.settings.protocol_option == ("motd=a=b", "rooms=x", "rooms=y", "limit=5", "open=true", "rate=1.5")
    assert loaded.where("protocol") == f"{file}: protocol"
    assert load({}, {}, config("[protocol]\nmotd = 'x'")).settings.protocol == "echo"
    assert load({}, {}, config("protocol = 'x:y'\nprotocol-option = ['name=z']")).settings.protocol_option == (
        "name=z",
    )


def test_options_are_merged_from_all_sources_by_precedence(config) -> None:
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
def test_an_error_in_the_protocol_table_names_the_key(config, content, problem) -> None:
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
        # Without a bracket, quotes and backslashes are ordinary characters.
        (r"""a=b\x00 c='d'  e="f" """, (r"a=b\x00", "c='d'", 'e="f"')),
        ("a=[1] b=[", ("a=[1]", "b=[")),
    ],
)
def test_a_json_array_in_a_variable_may_have_options_with_spaces(value, options) -> None:
    assert load({}, {"RTSERVICE_PROTOCOL_OPTION": value}, None).settings.protocol_option == options


def test_a_json_array_in_a_variable_may_have_descriptions_with_spaces() -> None:
    loaded = load({}, {"RTSERVICE_LISTEN": '["unix:/run/a b", "tcp:1"]'}, None)
    assert loaded.settings.listen == ("unix:/run/a b", "tcp:1")


@pytest.mark.parametrize(
    "value", ["[", '["a=hunter2", ]', '["a=hunter2"] b=1', "[1]", '[["a=hunter2"]]', "[" * 100_000]
)
def test_an_invalid_json_array_in_a_variable_is_rejected_and_not_shown(value) -> None:
    with pytest.raises(SettingError) as caught:
        load({}, {"RTSERVICE_PROTOCOL_OPTION": value}, None)
    assert str(caught.value) == (
        "RTSERVICE_PROTOCOL_OPTION: begins with [ but is not a JSON array of strings; the text is not shown"
    )


def test_an_invalid_protocol_option_is_reported_by_position_without_its_text() -> None:
    with pytest.raises(SettingError) as caught:
        load({}, {"RTSERVICE_PROTOCOL_OPTION": "password=hunter2 and=1 more-of-hunter2"}, None)
    assert str(caught.value) == (
        "RTSERVICE_PROTOCOL_OPTION: number 3 of 3: not of the form key=value; the text is not shown"
    )
