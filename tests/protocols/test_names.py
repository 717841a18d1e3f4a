"""Names of members and rooms: allowed characters, and confusable names (UTS #39)."""

import unicodedata

import pytest

from rtservice.protocols import confusables
from rtservice.protocols.names import _DEFAULT_IGNORABLE, TakenNames, default_ignorable


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("ann", "ann"),
        ("Ann.Lee_2-x", "Ann.Lee_2-x"),
        ("ｗｉｄｅ", "wide"),
        ("cafe\u0301", "café"),
        ("жук7", "жук7"),
        ("Ωμέγα", "Ωμέγα"),
        ("さくら", "さくら"),
        ("山田カー", "山田カー"),
        ("佐々木", "佐々木"),
        ("김철수", "김철수"),
        ("שלום", "שלום"),
        ("محمد", "محمد"),
        ("x" * 20, "x" * 20),
        ("ﬁ" * 10, "fi" * 10),
    ],
)
def test_a_name_is_normalised(name, form) -> None:
    assert TakenNames(20).normalise(name) == form


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "a b", "a/b", "x" * 21, "ﬁ" * 11, "x" * 1000, "\ufdfa" * 2),
        # Invisible, or displayed as a space.
        *("\u3164", "\u115f", "\u1160", "\uffa0", "a\u3164", "a\u200b", "a\ufe0f", "a\U000e0041", "a\u00ad", "a\u034f"),
        *("\x1b[2J", "a\u202e", "\ud800", "\ue000", "a\u0301\u0301"),
        # More than one script, or a script that UAX #31 does not recommend.
        *("аnna", "annа", "αbc", "Ωж", "さくらx", "𐌀𐌁", "ᏆᎪ"),
        # Modifier letters, parts of syllables, and digits that are confusable with others.
        *("م\u0640", "aˀ", "ᄀ", "a١", "a৪", "½"),
    ],
    ids=ascii,
)
def test_an_invisible_or_ambiguous_name_is_rejected(name) -> None:
    assert TakenNames(20).normalise(name) == ""


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("ann", "ann"), ("ann", "Ann"), ("straße", "STRASSE"), ("ｗｉｄｅ", "wide")),
        *(("coco", "сосо"), ("HOPE", "НОРЕ"), ("ABE", "ΑΒΕ"), ("ноте", "HOTE"), ("ё", "ë")),
        *(("bob", "b0b"), ("Ian", "lan"), ("al1", "all"), ("modern", "modem"), ("encyclopædia", "encyclopaedia")),
        *(("ニ", "二"), ("ー", "一"), ("ข", "ฃ"), ("ك", "ک"), ("ס", "o")),
        # Differences of case and of letters combined.
        *(("WORLD", "w0r1d"), ("Сосо", "COCO"), ("сосо", "COCO"), ("IAN", "lan")),
    ],
    ids=ascii,
)
def test_confusable_names_cannot_both_be_taken(name, other) -> None:
    for first, second in ((name, other), (other, name)):
        names = TakenNames(20)
        first, second = names.normalise(first), names.normalise(second)
        assert first
        assert second
        names.add(first)
        assert names.like(second) == first
        assert names.like(second, instead_of=first) == ""
        names.discard(first)
        assert names.like(second) == ""


@pytest.mark.parametrize(
    ("name", "other"),
    [("ann", "anne"), ("ann", "hann"), ("жук", "huk"), ("tea", "den"), ("café", "cafe"), ("a.b", "a-b")],
)
def test_distinguishable_names_can_both_be_taken(name, other) -> None:
    names = TakenNames(20)
    names.add(name)
    assert names.like(other) == ""
    names.add(other)
    assert name in names
    assert other in names
    names.discard("never taken")
    names.discard(name)
    assert name not in names
    assert other in names


def test_default_ignorable_characters_are_rejected() -> None:
    names = TakenNames(20)
    ignorable = [chr(code) for first, last in _DEFAULT_IGNORABLE for code in range(first, last + 1)]
    assert len(ignorable) == 4174  # DerivedCoreProperties.txt
    for character in ignorable:
        assert default_ignorable(character)
        assert names.normalise(character) == names.normalise("a" + character) == ""
    assert not any(map(default_ignorable, "a\u3163\u3165\u1161\ufe10\U000e1000"))


def test_skeletons_are_normalised_and_have_no_other_skeleton() -> None:
    for character, prototype in confusables._PROTOTYPES.items():
        character = chr(character)
        assert unicodedata.normalize("NFD", character) == character or "\uac00" <= character <= "\ud7a3"
        assert confusables.skeleton(prototype) == unicodedata.normalize("NFD", prototype)
        assert len(prototype) <= 3
