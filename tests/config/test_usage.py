"""The help lists each option once, and fits the width of a terminal."""

import re

import pytest

from rtservice.config.schema import all_settings
from rtservice.config.values import FLAG, as_text
from rtservice.hosting.aliases import ALIASES
from rtservice.tap import Options

SETTINGS = tuple(all_settings(ALIASES))
OTHERS = ("config", "check", "print-config", "version", "help")


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """Return the lines of the help in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return str(Options()).splitlines()


def entries(lines: list[str]) -> dict[str, str]:
    """Return the text of each entry, joined to one line, by the name of the option."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        match = re.match(r"  (?:-\w, |    )--([\w-]+)", line)
        if match:
            name = match[1]
            assert name not in found
            found[name] = []
        if name and line.startswith("  "):
            found[name].append(line.strip())
    return {name: " ".join(" ".join(text).split()) for name, text in found.items()}


def test_each_option_is_listed_once(lines) -> None:
    assert sorted(entries(lines)) == sorted((*(setting.name for setting in SETTINGS), *OTHERS))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_an_entry_has_the_option_its_help_and_its_default(lines, setting) -> None:
    entry = entries(lines)[setting.name]
    begin = f"-{setting.short}, --{setting.name}" if setting.short else f"--{setting.name}"
    assert entry.startswith(f"{begin} {setting.metavar}".rstrip() + " ")
    assert setting.help.replace("`", "") in entry
    assert bool(setting.metavar) == (setting.kind is not FLAG)
    assert ("[repeatable]" in entry) == setting.repeatable
    default = as_text(setting.default) if setting.kind is not FLAG else ""
    assert (f"[default: {default}]" in entry) == bool(default)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_help_text_is_one_or_two_short_sentences(setting) -> None:
    assert setting.help.endswith(".")
    assert 1 <= len(re.findall(r"\.(?= |$)", setting.help)) <= 2
    assert len(setting.help.replace("`", "")) <= 160


def test_the_most_used_options_are_listed_first(lines) -> None:
    assert [*entries(lines)][:5] == ["port", "listen", "protocol", "workers", "status"]
    headings = [line.removesuffix(":") for line in lines if re.match(r"[A-Z][\w ]+:$", line)]
    assert headings[:3] == ["Examples", "Most used", "Configuration and help"]
    assert headings[3:] == list(dict.fromkeys(setting.topic for setting in SETTINGS))


@pytest.mark.parametrize(
    ("columns", "most"), [("80", 80), ("300", 80), ("60", 75), ("20", 75), ("", 80), ("x", 80), ("0", 75)]
)
def test_no_line_is_wider_than_80_columns(monkeypatch, columns, most) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = str(Options())
    assert max(map(len, text.splitlines())) <= most
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert text.isascii()


def test_lines_are_wrapped_for_a_narrower_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = str(Options()).splitlines()
    assert all(len(line) <= 60 for line in lines if not line.startswith("  twistd "))
