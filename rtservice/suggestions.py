"""Suggestions for a name that does not exist: the nearest known name, for "did you mean NAME?"."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The name of `known` that is closest to `given`, or None: the same but for case and `-_.`, or else similar."""
    import difflib  # a rare need

    names = {_plain(name): name for name in known}
    plain = _plain(given)
    if plain in names:
        return names[plain]
    close = difflib.get_close_matches(plain, names, 1)
    return names[close[0]] if close else None


def did_you_mean(meant: str | None) -> str:
    """The end of an error message that suggests this, such as a command's option or `shout:Shout`; empty for None."""
    return f"; did you mean {meant}?" if meant else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(".", "")
