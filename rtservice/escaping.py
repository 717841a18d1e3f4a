"""Escape text of unknown origin for logs, terminals and one-line messages."""

from __future__ import annotations

# Distinct unprintable characters that are escaped one by one. No honest text has more; a hostile one may have so many
# that their escapes would take tens of milliseconds.
_MOST_DISTINCT = 256


def escaped(text: str, *, keep: str = "") -> str:
    r"""Return `text` with a Python escape for each unprintable character: `\n`, `\x1b`, `\u202e`, `\U000e0001`.

    Printable is what `str.isprintable` accepts. Escaped are therefore C0 and C1 controls and DEL (ECMA-48), line and
    paragraph separators, every space but U+0020, bidirectional and other format characters, unassigned code points and
    lone surrogates. Printable characters of all scripts stay, and so does a backslash: the result is for people, and
    cannot be read back. Escaping a result again changes nothing.

    The characters of `keep` stay: a message of several lines takes `keep="\n\t"`. In a text with more than 256
    different unprintable characters, everything outside ASCII is escaped. Takes linear time, about 0.1 µs for each
    character.
    """
    if text.isprintable():
        return text
    strange = [char for char in set(text) if not (char.isprintable() or char in keep)]
    if len(strange) > _MOST_DISTINCT:
        return escaped(text.encode("ascii", "backslashreplace").decode(), keep=keep)
    return text.translate({ord(char): char.encode("unicode_escape").decode() for char in strange})
