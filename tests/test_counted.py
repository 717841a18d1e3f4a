"""Counts in messages use the correct singular or plural."""

import ast
import re
from pathlib import Path

import pytest

import rtservice
from rtservice.counted import counted


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 days"), (1, "1 day"), (1.0, "1 day"), (2, "2 days"), (11, "11 days"), (-1, "-1 days")]
)
def test_only_a_count_of_1_is_singular(count, text) -> None:
    assert counted(count, "day") == text


# A plural noun directly after a placeholder for a number, which may be 1.
_PLURAL = re.compile(r"\{\} (connections|clients|workers|days|records|sockets|rooms|listeners|certificates|headers)\b")


@pytest.mark.parametrize("path", sorted(Path(rtservice.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_text_has_a_fixed_plural_after_a_number(path: Path) -> None:
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(re.sub(r"\{[^{} ]*\}", "{}", node.value))
    assert not [text for text in texts if _PLURAL.search(text)]
