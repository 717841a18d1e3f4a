"""Phrases that the style guide rejects do not occur in the package, its examples, its documentation and its tests.

The check covers docstrings, comments and string constants (help, error and log texts) of `rtservice/`, the text of
`etc/`, `docs/` and the README, and docstrings, comments and function names of `tests/`. It cannot judge whether a
sentence is clear; it finds stylised phrases that have a plain replacement.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import rtservice

ROOT = Path(__file__).parent.parent
PACKAGE = Path(rtservice.__file__).parent
TESTS = Path(__file__).parent

# Rejected phrases, as regular expressions, and what to write instead.
REJECTED = {
    r"a place to send clients to": "ready for traffic",
    r"again and again": "repeatedly",
    r"alas": "leave it out",
    r"all the same": "nevertheless, or leave it out",
    r"as (?:it|they) likes?": "in any number, for any time",
    r"as it is(?= said|[.,;:)]|$)": "unchanged",
    r"at the (?:least|most)": "at least, at most",
    r"be it": "also if it is",
    r"(?:can|cannot|could|may|to) be had": "is available, can be resolved, can be bound",
    r"for ever": "forever",
    r"for good": "permanently",
    r"for want of": "if … is missing",
    r"from (?:then|here|now) on, and": "split the sentence",
    r"gives what": "returns",
    r"go(?:es|ne)? mad": "is faulty",
    r"goes? on with": "continues with",
    r"has not the (?:rights?|permission)": "has no permission",
    r"hears? of": "receives, is notified of",
    r"in force": "current, applied",
    r"in the place of": "instead of, replaces",
    r"in vain": "without success",
    r"(?:is|are|was|were|be) said": "is logged, is reported",
    r"(?:is|are|was|were|be|been) told": "is notified, is configured to; connectionLost is called",
    r"knocks?": "connects",
    r"knows? of": "detects, has a reference to",
    r"(?:no|any|some|every)body": "no client, no process, every connection",
    r"(?:no|any|some|every)body's": "of another user, of all processes",
    r"of (?:its|his|their|our) own": "separate; its, their",
    r"of ours": "of rtservice",
    r"on (?:its|their) way": "in progress, in flight",
    r"out of (?:its|their) mind": "is faulty",
    r"says? (?:goodbye|so)": "closes; reports this",
    r"signs? of life": "heartbeat, watchdog notification",
    r"the same in steps": "do the work of … in steps",
    r"twice over": "twice",
    r"what there is": "all of it",
    r"what is not there": "missing",
    r"whoever": "the client, the user, the process that",
    r"who is here": "open connections",
}
_REJECTED = {
    re.compile(rf"\b(?:{phrase})\b" if phrase[-1] != ")" else rf"\b{phrase}", re.IGNORECASE): plain
    for phrase, plain in REJECTED.items()
}

# Places where a phrase is right: a file relative to the root of the repository, and the words around the phrase.
ALLOWED = {
    ("docs/howto/systemd.md", "--uid=nobody"),  # the user
    ("etc/logrotate.d/rtservice", "nobody"),  # the user
}


def texts_of_code(source: str) -> Iterator[str]:
    """Yield each string constant of a Python source, and each block of consecutive comment lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    yield from comments_of(source)


def texts_of_tests(source: str) -> Iterator[str]:
    """Yield each docstring of a Python source, each function name as words, and each block of comment lines.

    String constants are omitted: they are test data.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name.replace("_", " ")
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    yield from comments_of(source)


def comments_of(source: str) -> Iterator[str]:
    """Yield each block of consecutive comment lines of a Python source."""
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("#"))
            last = token.start[0]
    yield " ".join(block)


def texts_of(path: Path) -> Iterator[str]:
    """Yield the texts of a file. Of a page, code blocks are included: they show output of the service."""
    content = path.read_text(errors="replace")
    if path.is_relative_to(TESTS):
        yield from texts_of_tests(content)
    elif path.suffix == ".py":
        yield from texts_of_code(content)
    else:
        yield re.sub(r"^\s*(?:#|//|[*]) ?", "", content, flags=re.MULTILINE)


def rejected_in(text: str) -> Iterator[tuple[str, str]]:
    """Yield each rejected phrase in a text, with the words around it, and its plain replacement."""
    joined = " ".join(text.split())
    for phrase, plain in _REJECTED.items():
        for match in phrase.finditer(joined):
            yield joined[max(0, match.start() - 40) : match.end() + 40], plain


def checked_files() -> list[tuple[str, Path]]:
    """Return the checked files, each with its name relative to the root of the repository."""
    named = [(f"rtservice/{path.relative_to(PACKAGE)}", path) for path in PACKAGE.rglob("*")]
    named += [(str(path.relative_to(ROOT)), path) for part in ("etc", "docs") for path in (ROOT / part).rglob("*")]
    named += [(str(path.relative_to(ROOT)), path) for path in TESTS.rglob("*.py")]
    named.append(("README.md", ROOT / "README.md"))
    return sorted(
        (name, path) for name, path in named if path.is_file() and path.suffix not in (".png", ".svg", ".pyc")
    )


@pytest.mark.parametrize(("name", "path"), [pytest.param(name, path, id=name) for name, path in checked_files()])
def test_a_file_has_no_rejected_phrase(name: str, path: Path) -> None:
    allowed = [words for file, words in ALLOWED if file == name]
    found = [
        f"…{words}…: write {plain}"
        for text in texts_of(path)
        for words, plain in rejected_in(text)
        if not any(excuse in words for excuse in allowed)
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        '"""Nobody is there."""\n',
        "# One that\n# nobody\n# has read.\n",
        "x = 1  # a sign of life\n",
        'raise ValueError(f"{1} is told that")\n',
        'help = "a file, whoever\\n  wrote it"\n',
    ],
)
def test_a_rejected_phrase_is_found_in_each_kind_of_text(source: str) -> None:
    assert [found for text in texts_of_code(source) for found in rejected_in(text)]


@pytest.mark.parametrize(
    "source",
    [
        '"""Nobody is there."""\n',
        'class A:\n    """It knows of B."""\n',
        'def f():\n    """A sign of life."""\n',
        "# One that\n# nobody\n# has read.\n",
        "def test_whoever_connects_is_greeted(): ...\n",
        "async def test_settings_in_force_are_kept(): ...\n",
    ],
)
def test_a_rejected_phrase_is_found_in_each_kind_of_text_of_a_test(source: str) -> None:
    assert [found for text in texts_of_tests(source) for found in rejected_in(text)]


def test_string_constants_of_a_test_are_not_checked() -> None:
    assert not [found for text in texts_of_tests('user = "nobody"\n') for found in rejected_in(text)]


def test_a_phrase_is_found_across_lines_but_not_within_words() -> None:
    assert list(rejected_in("the settings in\n    force"))
    assert not list(rejected_in("the setting is enforced, and a knob may be italic"))
