"""Redaction: replace parts of a text that may be secret with a placeholder."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Shown instead of a value. Options reject it, so that output of --print-config does not start a service unnoticed.
HIDDEN = "<hidden>"

# rtservice's types of listen descriptions. Their arguments are no secrets: keys and certificates are paths.
OPEN_TYPES = frozenset(("tcp", "tcp6", "ssl", "unix", "systemd", "proxy", "haproxy"))

# Arguments with the address, in all types.
_OPEN_KEYWORDS = frozenset(("port", "interface", "address", "backlog", "host", "mode"))

# Shorter values are no secrets, and would be replaced within unrelated words.
_SHORTEST_SECRET = 4

# From `://` to the last @ before the path (RFC 3986, section 3.2.1). Descriptions may have backslashes before slashes.
_USERINFO = re.compile(r"(:\\?/\\?/)[^/\s]*@")

_KEYWORD = re.compile(r"((?:^|:)((?:\\.|[^:=\\])*)=)((?:\\.|[^:\\])*)", re.DOTALL)


def hide_userinfo(text: str) -> str:
    """Hide the user and password of each URL in a text."""
    return _USERINFO.sub(rf"\1{HIDDEN}@", text)


def hide_in_description(description: str) -> str:
    """Return a listen description for display. The values of most keywords of third-party types are hidden."""
    if not _may_hold_secrets(description):
        return description

    def hidden(match: re.Match[str]) -> str:
        return match[0] if match[2] in _OPEN_KEYWORDS else f"{match[1]}{HIDDEN}"

    return hide_userinfo(_KEYWORD.sub(hidden, description))


def values_in_description(description: str) -> list[str]:
    """Return the values that `hide_in_description` hides, without their backslashes."""
    if not _may_hold_secrets(description):
        return []
    found = [match[3] for match in _KEYWORD.finditer(description) if match[2] not in _OPEN_KEYWORDS]
    return [re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for value in found]


def hide_values(text: str, values: Iterable[str]) -> str:
    """Hide these values in a third-party text, such as `invalid literal for int(): 'hunter2'`."""
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return text


def _may_hold_secrets(description: str) -> bool:
    kind, colon, _ = description.partition(":")
    return bool(colon) and kind not in OPEN_TYPES
