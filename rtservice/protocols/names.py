"""Distinguishable names: the valid characters of a name, and the check against similar names that are taken.

A name is compared in the form NFKC (UAX #15), and consists of letters of one script, ASCII digits and `. _ -`. Han,
Hiragana, Katakana, Bopomofo and Hangul count as one script, since Chinese, Japanese and Korean names mix them. This is
stricter than the "highly restrictive" level of UTS #39, section 5.2, which adds Latin to these.

A name is rejected if it equals a taken one except for case, or looks like one (`rtservice.protocols.confusables`).
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from rtservice.protocols.confusables import skeleton

# Default_Ignorable_Code_Point of DerivedCoreProperties.txt, Unicode 17.0: characters that are invisible if a font does
# not support them. Some are letters, such as the Hangul fillers.
_DEFAULT_IGNORABLE = (
    (0x00AD, 0x00AD),  # soft hyphen
    (0x034F, 0x034F),  # combining grapheme joiner
    (0x061C, 0x061C),  # Arabic letter mark
    (0x115F, 0x1160),  # Hangul choseong and jungseong fillers
    (0x17B4, 0x17B5),  # Khmer inherent vowels
    (0x180B, 0x180F),  # Mongolian variation selectors and vowel separator
    (0x200B, 0x200F),  # zero width space, joiners, marks of direction
    (0x202A, 0x202E),  # embeddings and overrides of direction
    (0x2060, 0x206F),  # word joiner, invisible operators, isolates, deprecated format characters
    (0x3164, 0x3164),  # Hangul filler
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFEFF, 0xFEFF),  # zero width no-break space
    (0xFFA0, 0xFFA0),  # halfwidth Hangul filler
    (0xFFF0, 0xFFF8),  # unassigned
    (0x1BCA0, 0x1BCA3),  # shorthand format controls
    (0x1D173, 0x1D17A),  # musical symbols that begin and end something
    (0xE0000, 0xE0FFF),  # tags, variation selectors supplement
)

# The recommended scripts of UAX #31, table 5, by the first word of their letters' names, since the standard library
# does not have the property Script. This agrees with Scripts.txt for every letter that `_script` accepts.
_SCRIPTS = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL"), "CJK"),
    **{
        word: word
        for word in (
            *("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC", "THAANA", "ETHIOPIC"),
            *("DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM"),
            *("SINHALA", "THAI", "LAO", "TIBETAN", "MYANMAR", "KHMER"),
        )
    },
}

_NO_SCRIPT = frozenset("0123456789._-")


def default_ignorable(character: str) -> bool:
    """Return whether a character has the property Default_Ignorable_Code_Point."""
    code = ord(character)
    return any(first <= code <= last for first, last in _DEFAULT_IGNORABLE)


@lru_cache(maxsize=1024)
def _script(character: str) -> str:
    """Return the script of a letter that names can contain; empty for any other character."""
    if (
        character in "\u30fc\u3005"
    ):  # the prolonged sound mark, as in \u30ab\u30fc, and the iteration mark, as in \u4f50\u3005\u6728
        return "CJK"
    # Excludes modifier letters, such as the Arabic tatweel, and the letters of which Hangul syllables consist.
    if unicodedata.category(character) not in ("Lu", "Ll", "Lt", "Lo") or default_ignorable(character):
        return ""
    name = unicodedata.name(character, "")
    if name.startswith("HANGUL") and not name.startswith("HANGUL SYLLABLE"):
        return ""
    return _SCRIPTS.get(name.replace("-", " ").partition(" ")[0], "")


class TakenNames:
    """The taken names of members or of rooms, each of at most `longest` characters."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._taken: dict[str, str] = {}  # by each of its similarity keys

    def __contains__(self, name: str) -> bool:
        return self._taken.get(name.casefold()) == name

    def normalise(self, name: str) -> str:
        """Return the normal form of a name, which is shown and compared; empty if it is invalid."""
        # NFKC replaces a character by up to 18, and may compose a letter and its marks.
        if len(name) > 4 * self._longest:
            return ""
        name = unicodedata.normalize("NFKC", name)
        if not 0 < len(name) <= self._longest:
            return ""
        scripts = {_script(character) for character in name if character not in _NO_SCRIPT}
        return "" if len(scripts) > 1 or "" in scripts else name

    def like(self, name: str, instead_of: str = "") -> str:
        """Return a taken name that equals this one or looks like it; empty if there is none.

        `instead_of` is a taken name to ignore, since this one would replace it.
        """
        found = (self._taken.get(key, "") for key in similarity_keys(name))
        return next((taken for taken in found if taken and taken != instead_of), "")

    def add(self, name: str) -> None:
        """Take a name for which `like` returns an empty text."""
        self._taken |= dict.fromkeys(similarity_keys(name), name)

    def discard(self, name: str) -> None:
        """Free a name, if it is taken."""
        for key in similarity_keys(name):
            if self._taken.get(key) == name:
                del self._taken[key]


@lru_cache(maxsize=4096)
def similarity_keys(name: str) -> tuple[str, ...]:
    """Return 1 to 4 different keys of a name. Two names with a common key look alike or differ only in case."""
    folded = name.casefold()
    keys = (
        folded,
        skeleton(name).casefold(),
        skeleton(folded).casefold(),
        skeleton(name.upper()).casefold(),  # for small letters that look like capitals of another script
    )
    return tuple(dict.fromkeys(keys))
