"""The schema: every setting's text becomes a value, or an error that names the text."""

import pytest

from rtservice.settings import ESCAPED, SettingError, from_values, schema, whole_number
from rtservice.tap import Options


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


@pytest.mark.parametrize("setting", list(schema()), ids=lambda setting: setting.name)
def test_a_default_is_what_its_text_says(setting) -> None:
    if setting.default_text not in ("", "all"):
        assert setting.kind.parse(setting.default_text) == setting.default
    assert setting.help.endswith(".")


def test_the_command_line_is_made_from_the_schema() -> None:
    options = Options()
    options.parseOptions(["-p", "0", "-i", "::1", "-l", "tcp:1", "--listen", "unix:/x", "--greeting=", "--backlog=7"])
    in_force = options.settings()
    assert (in_force.port, in_force.interface, in_force.backlog) == (0, "::1", 7)
    assert in_force.listen == ("tcp:1", "unix:/x")
    assert in_force.greeting == b""


def test_no_option_is_the_defaults() -> None:
    options = Options()
    options.parseOptions([])
    assert options.settings() == from_values({})


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--port", "70000"], "--port: '70000'"),
        (["--nonsense"], "nonsense"),
        (["--framing", "xml"], "--framing: 'xml' is not one of raw, line, netstring, int32"),
        (["--listen="], "--listen: the value is empty"),
        (["surplus"], "'surplus'"),
    ],
)
def test_a_mistake_is_one_line_that_names_setting_and_value(arguments: list[str], names: str) -> None:
    with pytest.raises(SystemExit) as caught:
        Options().parseOptions(arguments)
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)
