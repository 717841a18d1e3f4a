"""Option values from files and variables, and the errors for unreadable ones."""

import os

import pytest

from rtservice.references import OptionValue, UnresolvedError, is_reference, resolve


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("", ""),
        ("a@b$c", "a@b$c"),
        ("@@home", "@home"),
        ("$$5", "$5"),
        ("@@", "@"),
        ("$$$", "$$"),
    ],
)
def test_a_plain_text_is_unchanged_and_a_doubled_sign_is_an_escape(text, value) -> None:
    found = resolve(f"x={text}", {}, "/")
    assert found == OptionValue("x", value)
    assert not is_reference(text)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"hunter2", "hunter2"),
        (b"hunter2\n", "hunter2"),
        (b"hunter2\r\n", "hunter2"),
        (b"hunter2\n\n", "hunter2\n"),
        (b"hunter2\r", "hunter2\r"),
        (b" a\nb \n", " a\nb "),
        (b"", ""),
        (b"\n", ""),
        (b"@@$x", "@@$x"),
        (b"\xff", "\udcff"),
    ],
)
def test_a_file_reference_returns_the_content_without_the_last_line_end(tmp_path, content, value) -> None:
    (tmp_path / "pw").write_bytes(content)
    for path in (tmp_path / "pw", "pw", "./no/../pw"):
        assert resolve(f"x=@{path}", {}, str(tmp_path)) == OptionValue("x", value, referred=True)
    assert is_reference("@pw")


def test_a_symbolic_link_is_followed_and_the_current_content_is_read(tmp_path) -> None:
    (tmp_path / "pw").symlink_to("target")
    for content in ("one", "two"):
        (tmp_path / "target").write_text(content)
        assert resolve("x=@pw", {}, str(tmp_path)).text == content


@pytest.mark.parametrize("value", ["hunter2", "", "$X", "@/etc/passwd", "a\n"])
def test_a_variable_reference_returns_the_value(value) -> None:
    assert resolve("x=$The_1", {"The_1": value}, "/") == OptionValue("x", value, referred=True)
    assert is_reference("$The_1")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("@none", "cannot read the file '{0}/none': no such file or directory"),
        ("@.", "cannot read the file '{0}': is a directory"),
        ("@pw/x", "cannot read the file '{0}/pw/x': not a directory"),
        ("@loop", "cannot read the file '{0}/loop': too many levels of symbolic links"),
        ("@pipe", "'{0}/pipe' is not a regular file"),
        ("@/dev/zero", "'/dev/zero' is not a regular file"),
        ("@large", "the file '{0}/large' is longer than 1048576 bytes"),
        ("@a\0b", "'{0}/a\\x00b' is not a path: it contains a NUL byte"),
        ("@", "no path follows @; write @@ for a value that begins with @"),
        ("$NONE", "the environment variable NONE is not set"),
        ("$", "no name of a variable follows $; write $$ for a value that begins with $"),
        ("$1.50", "no name of a variable follows $; write $$ for"),
        ("${X}", "no name of a variable follows $; write $$ for"),
        ("$hunter2!", "no name of a variable follows $; write $$ for"),
    ],
)
def test_an_error_is_one_line_that_names_the_option_and_no_value(tmp_path, text, problem) -> None:
    (tmp_path / "pw").write_text("hunter2")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as large:
        large.truncate(1024 * 1024 + 1)
    with pytest.raises(UnresolvedError) as caught:
        resolve(f"x={text}", {"X": "hunter2"}, str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"option x: {problem.format(tmp_path)}")
    assert "\n" not in message
    assert "hunter2" not in message


def test_repr_hides_the_value() -> None:
    assert "hunter2" not in repr(OptionValue("x", "hunter2"))
