"""Escape text of unknown origin for logs, terminals and one-line messages."""

from __future__ import annotations


def escaped(text: str, *, keep: str = "") -> str:
    r"""Return `text` with a Python escape for each unprintable character: `\n`, `\x1b`, `\u202e`, `\U000e0001`.

    Printable is what `str.isprintable` accepts. Escaped are therefore C0 and C1 controls and DEL (ECMA-48), line and
    paragraph separators, every space but U+0020, bidirectional and other format characters, unassigned code points and
    lone surrogates. Printable characters of all scripts stay, and so does a backslash: the result is for people, and
    cannot be read back. Escaping a result again changes nothing.

    The characters of `keep` stay: a message of several lines takes `keep="\n\t"`. Takes linear time: about 0.1 µs for a
    character, 1.5 µs for one that occurs once.
    """
    if text.isprintable():
        return text
    strange = (char for char in set(text) if not (char.isprintable() or char in keep))
    return text.translate({ord(char): char.encode("unicode_escape").decode() for char in strange})
