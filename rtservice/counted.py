"""Counts with their nouns, in texts that people read: `1 connection`, `2 connections`."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """Return a count and the noun, in the plural unless the count is 1: whatever the noun, by an `s` at its end."""
    return f"{count:g} {noun}" if count == 1 else f"{count} {noun}s"
