"""Suggestions for unknown names: "did you mean NAME?"."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(given: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` that is nearest to `given`, or None.

    A name that differs only in case and `-_.` has priority over a similar one.
    """
    import difflib  # rarely needed

    names = {_plain(name): name for name in known}
    plain = _plain(given)
    if plain in names:
        return names[plain]
    close = difflib.get_close_matches(plain, names, 1)
    return names[close[0]] if close else None


def did_you_mean(meant: str | None) -> str:
    """Return the end of an error message that suggests `meant`; empty for None."""
    return f"; did you mean {meant}?" if meant else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(".", "")
