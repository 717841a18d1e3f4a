"""Tests of Twisted's that pass on its epoll reactor and need not on ours, and why; by what they run on."""

from __future__ import annotations

DIFFERENCES: dict[str, dict[str, str]] = {"rtservice": {}, "adopting": {}}
