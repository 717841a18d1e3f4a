"""Format counts with their nouns: `1 connection`, `2 connections`."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """Return a count, rounded to an integer, and the noun, with an `s` unless the count is 1."""
    return f"{count:.0f} {noun}" if count == 1 else f"{count:.0f} {noun}s"
