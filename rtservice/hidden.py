"""Redaction: the placeholder for a text that may be a secret, and the parts of a text that it replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Shown instead of a value. No option takes it, so that nobody serves with a file that --print-config has printed.
HIDDEN = "<hidden>"

# The types of listen descriptions of ours, none of whose arguments is a secret: keys and certificates are paths.
OPEN_TYPES = frozenset(("tcp", "tcp6", "ssl", "unix", "systemd", "proxy", "haproxy"))

# Arguments that say where to listen, whatever the type.
_OPEN_KEYWORDS = frozenset(("port", "interface", "address", "backlog", "host", "mode"))

# A value that is shorter is no secret, and would be found in words where it is not meant.
_SHORTEST_SECRET = 4

# From `://` to the last @ before the path (RFC 3986, section 3.2.1). Descriptions may have backslashes in between.
_USERINFO = re.compile(r"(:\\?/\\?/)[^/\s]*@")

_KEYWORD = re.compile(r"((?:^|:)((?:\\.|[^:=\\])*)=)((?:\\.|[^:\\])*)", re.DOTALL)


def hide_userinfo(text: str) -> str:
    """A text with the user and the password hidden of each URL in it."""
    return _USERINFO.sub(rf"\1{HIDDEN}@", text)


def hide_in_description(description: str) -> str:
    """A listen description as it may be shown: of a type that is not ours without the values of most keywords."""
    if not _may_hold_secrets(description):
        return description

    def hidden(match: re.Match[str]) -> str:
        return match[0] if match[2] in _OPEN_KEYWORDS else f"{match[1]}{HIDDEN}"

    return hide_userinfo(_KEYWORD.sub(hidden, description))


def values_in_description(description: str) -> list[str]:
    """The values that `hide_in_description` hides, as the endpoint's parser gets them."""
    if not _may_hold_secrets(description):
        return []
    found = [match[3] for match in _KEYWORD.finditer(description) if match[2] not in _OPEN_KEYWORDS]
    return [re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL) for value in found]


def hide_values(text: str, values: Iterable[str]) -> str:
    """A text of somebody else's, such as `invalid literal for int(): 'hunter2'`, with these values hidden."""
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return text


def _may_hold_secrets(description: str) -> bool:
    kind, colon, _ = description.partition(":")
    return bool(colon) and kind not in OPEN_TYPES
