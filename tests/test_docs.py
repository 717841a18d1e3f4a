"""The documentation matches the code, and the runner of its commands reports incorrect pages."""

import ast
import contextlib
import errno
import importlib.util
import itertools
import os
import re
import select
import sys

import pytest

from rtservice.config.render import reference
from rtservice.config.schema import all_settings
from rtservice.config.sources import variable
from rtservice.config.values import as_text
from rtservice.events import EVENTS
from rtservice.hosting.aliases import ALIASES
from rtservice.testing import DEADLINE
from tests.support.repository import PACKAGE, ROOT
from tests.test_imports import MAY_IMPORT

SETTINGS = tuple(all_settings(ALIASES))


# --- the reference of settings ---


def test_settings_are_grouped_by_topic() -> None:
    topics = [setting.topic for setting in SETTINGS]
    assert all(topics)
    assert len([topic for topic, _ in itertools.groupby(topics)]) == len(set(topics))


def test_the_reference_describes_each_setting_as_the_schema_does() -> None:
    page = reference(SETTINGS)
    for topic in {setting.topic for setting in SETTINGS}:
        assert f"\n## {topic}\n" in f"\n{page}"
    for setting in SETTINGS:
        assert page.count(f"```{{confval}} {setting.name}\n") == 1
        described = page.partition(f"```{{confval}} {setting.name}\n")[2].partition("\n```\n")[0]
        default = as_text(setting.default)
        assert setting.kind.accepts in described
        assert (f":default: `{default}`" in described) == bool(default)
        assert f"\n{setting.help}\n" in described
        assert setting.details in described
        assert f"`--{setting.name}`" in described
        assert f"`{variable(setting.name)}`" in described
        assert f"after a {setting.applied_by}." in described
        assert not setting.short or f"`-{setting.short}`" in described


def test_the_settings_page_is_generated() -> None:
    assert "\n% generated: settings\n" in (ROOT / "docs/reference/settings.md").read_text()


# --- pages that Sphinx does not build ---


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_file_links_lead_to_existing_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).is_file()]
    assert missing == []
    assert links or page == "CONTRIBUTING.md"


def test_every_page_but_an_index_is_linked_from_the_readme_or_an_index() -> None:
    linked = (ROOT / "README.md").read_text() + "".join(page.read_text() for page in ROOT.glob("docs/**/index.md"))
    pages = [page.stem for page in ROOT.glob("docs/**/*.md") if page.stem != "index"]
    assert len(pages) > 20
    assert [name for name in pages if not re.search(rf"\b{name}\b", linked)] == []


# --- the list of source files ---


def _tables_of_files() -> str:
    return (ROOT / "docs/explanation/source.md").read_text()


def test_the_list_of_source_files_has_each_module_once() -> None:
    listed = re.findall(r"^\| `rtservice/([\w/]+\.py)` \| \S", _tables_of_files(), re.MULTILINE)
    modules = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    assert len(modules) > 60
    assert sorted(listed) == sorted(modules)


def test_the_list_of_source_files_has_the_allowed_imports() -> None:
    def parts(cell: str) -> set[str]:
        names = {name.rstrip("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", cell)}
        return {"" if name == "__init__" else name for name in names}

    section = _tables_of_files().partition("## Which part")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    listed = {part: parts(imports) for cell, imports in rows for part in parts(cell)}
    assert listed == {part.replace("__init__", ""): imports for part, imports in MAY_IMPORT.items()}


def test_files_named_in_the_list_of_source_files_exist() -> None:
    named = re.findall(
        r"`((?:config|hosting|net|observe|pool|process|protocols|startup)/[\w/]*(?:\.py)?)`", _tables_of_files()
    )
    assert len(set(named)) > 15
    assert [name for name in named if not (PACKAGE / name).exists()] == []


# --- troubleshooting ---

# Placeholders for values in messages of the page: words in capitals, numbers, quoted names, paths, an ellipsis; and
# some words that the code inserts.
_VALUE = re.compile(r"…|\b[A-Z]+\b|'[^']*'|[\w./:-]*\d[\w./:-]*|/\S+|\w*\.\w+|private key|reopened|records were")


def _texts_of_the_code() -> str:
    texts = [os.strerror(number).lower() for number in errno.errorcode]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                # Text in braces is a value.
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{[^{}]*\}", "\0", node.value))
    return "\n".join(texts)


def _quoted_messages() -> list[str]:
    """Return the terms of the definition lists that are messages: code with several words."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    terms = re.findall(r"^(.*)\n: ", page, re.MULTILINE)
    return [code for term in terms for code in re.findall(r"`([^`]+)`", term) if len(code.split()) > 3]


def test_the_messages_in_troubleshooting_exist_in_the_code() -> None:
    code, messages = _texts_of_the_code(), _quoted_messages()
    assert len(messages) > 40
    missing = []
    for message in messages:
        for part in re.split(r"[\0]|: |; |^--[\w-]+ ", _VALUE.sub("\0", message)):
            words = part.strip(" :;,()[]")
            if len(words) > 8 and words not in code:
                missing.append((message, words))
    assert missing == []


def test_the_events_in_troubleshooting_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    named = re.findall(r"`[^`]+` \(`([a-z_]+\.[a-z_]+)`\)", page)
    assert len(named) > 5
    assert [name for name in named if name not in EVENTS] == []


# --- the runner of commands ---


@pytest.fixture(scope="module")
def pages():
    """The runner, imported as a module."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / ".ci/pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pages"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pages"]


@pytest.fixture
def run(pages, tmp_path, monkeypatch, capsys):
    """Run a page; return the exit status and the output."""
    monkeypatch.setattr(pages, "RETRY", 0.0)

    def run(text: str) -> tuple[int, str]:
        (tmp_path / "page.md").write_text(text)
        status = pages.main([str(tmp_path), str(tmp_path / "page.md")])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_a_correct_page_is_run_and_counted(run) -> None:
    status, printed = run(
        "<!-- copy: etc/rtservice.toml -->\n<!-- copy: etc/cluster -->\n\n"
        "<!-- run -->\n```sh\ntest -f etc/rtservice.toml -a -f etc/cluster/rtservice.toml\n```\n\n"
        "# A page\n\n<!-- file: a/b.txt -->\n```text\nhello\n```\n\n<!-- run -->\n```sh\ncp a/b.txt c\n```\n\n"
        "<!-- session -->\n```console\n$ cat c\nhello\n$ echo one \\\n  two\none two\n$ date\n...\n```\n\n"
        "<!-- not run: needs root -->\n```sh\nfalse\n```\n"
    )
    assert status == 0, printed
    assert "6 blocks run" in printed
    assert "not run: 1\n    1 × needs root" in printed


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("```sh\ntrue\n```\n", "has no comment such as"),
        ("```console\n$ true\n```\n", "has no comment such as"),
        ("text\n<!-- run -->\n\nmore text\n", "1 comments are not followed by a block"),
        ("<!-- copy: etc/none -->\n", "copy: [Errno 2] No such file or directory"),
        ("<!-- run -->\n```sh\nfalse\n```\n", "status 1: false"),
        ("<!-- run -->\n```sh\nfalse\ntrue\n```\n", "status 1: false"),
        ("<!-- session -->\n```console\n$ echo a\nb\n```\n", "expected:\nb\nfound:\na\n"),
        ("<!-- session -->\n```console\n$ echo a\n```\n", "expected:\nfound:\na\n"),
        ("<!-- session -->\n```console\n$ echo ab\na\n```\n", "found:\nab"),
        ("<!-- session -->\n```console\n$ echo a; false\na\n```\n", "status 1"),
        ("<!-- session -->\n```console\necho a\n```\n", "a session begins with"),
        ("<!-- not run -->\n```sh\ntrue\n```\n", "no reason"),
        ("<!-- serve -->\n```sh\necho it fails\n```\n", "the service did not start"),
        (
            "<!-- serve -->\n```sh\ntrap 'exit 3' TERM; echo listening on x; while sleep 0.1; do :; done\n```\n",
            "status 3",
        ),
        ("nothing to run\n", "no block was run"),
    ],
)
def test_an_incorrect_page_is_reported(run, page, problem) -> None:
    status, printed = run(page)
    assert status == 1
    assert problem in printed


def test_a_process_left_running_by_a_page_is_killed_and_reported(run, tmp_path) -> None:
    status, printed = run(
        f"<!-- run -->\n```sh\nsleep 60 >/dev/null & echo $! > left.pid; cp left.pid {tmp_path}/pid\n```\n"
    )
    assert (status, "leaves a daemon running" in printed) == (1, True)
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        process = os.pidfd_open(int((tmp_path / "pid").read_text()))
        ended, _, _ = select.select([process], [], [], DEADLINE)
        os.close(process)
        assert ended


@pytest.mark.parametrize(
    ("expected", "output", "matches"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a", True),
        ("a ... c\n", "a b c\n", True),
        ("a ... c\n", "a b\nb c\n", False),
        ("...\nlast\n", "one\ntwo\nlast\n", True),
        ("a.c\n", "abc\n", False),
        ("a\n", "a\nb\n", False),
    ],
)
def test_an_ellipsis_matches_any_text(pages, expected, output, matches) -> None:
    assert bool(pages.expected_pattern(expected).fullmatch(output)) == matches
