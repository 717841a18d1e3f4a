"""Escaped text has no characters that a terminal or a log viewer interprets."""

import sys
import time
import unicodedata

import pytest

from rtservice.escaping import escaped

ALL_CHARACTERS = "".join(map(chr, range(sys.maxunicode + 1)))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain ü 日本 \u20ac", "plain ü 日本 \u20ac"),
        ("two\n\tlines", r"two\n\tlines"),
        ("\x1b[31mred\x07\r\x00\x7f", r"\x1b[31mred\x07\r\x00\x7f"),
        ("é\x9b2J", r"é\x9b2J"),
        ("é\u202eright to left", r"é\u202eright to left"),
        ("\u2028", r"\u2028"),
        ("\ud800", r"\ud800"),
        ("\udcff", r"\udcff"),
        ("\U000e0001", r"\U000e0001"),
        ("a\xa0b", r"a\xa0b"),
        (r"a\x1b", r"a\x1b"),
    ],
)
def test_unprintable_characters_become_python_escapes(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(shown) == shown


def test_every_character_is_printable_or_escaped() -> None:
    assert escaped(ALL_CHARACTERS).isprintable()
    assert escaped("".join(filter(str.isprintable, ALL_CHARACTERS))) == "".join(filter(str.isprintable, ALL_CHARACTERS))


def test_control_format_surrogate_and_separator_characters_are_escaped() -> None:
    for char in ALL_CHARACTERS:
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert escaped(char).isascii()
            assert escaped(char).isprintable()


def test_only_the_named_characters_are_kept() -> None:
    assert escaped("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    assert escaped("a\n\tb", keep="\t") == "a\\n\tb"
    kept = escaped(ALL_CHARACTERS, keep="\n\t")
    assert (kept.count("\n"), kept.count("\t")) == (1, 1)
    assert kept.replace("\n", "").replace("\t", "").isprintable()


@pytest.mark.parametrize("part", ["\0", "\u202e", "aé\u202e日", "\U000e0001\ud800"])
def test_escaping_takes_linear_time(part: str) -> None:
    began = time.process_time()
    assert escaped(part * (4_000_000 // len(part))).isprintable()
    assert time.process_time() - began < 30


def test_many_different_unprintable_characters_cost_no_more_than_few() -> None:
    text = "é" + "".join(char for char in map(chr, range(0x30000, sys.maxunicode)) if not char.isprintable())[:31_500]
    began = time.process_time()
    for _ in range(20):
        shown = escaped(text)
    assert time.process_time() - began < 20
    assert shown.startswith(r"\xe9\U000")
    assert shown.isascii()
    assert escaped(f"\n{text}\x1b", keep="\n").startswith("\n\\xe9")
    assert escaped(f"\n{text}\x1b", keep="\n").endswith(r"\x1b")
