"""Every listener description in the documentation, the help and the shipped files is accepted."""

import os
import re

import pytest

from rtservice.config.schema import all_settings
from rtservice.net.description import FORMS, ListenError, parse
from rtservice.net.listen_types import read_description
from tests.support.repository import ROOT

# Shown in the documentation as invalid.
REFUSED = {"::1:8080"}

_TYPED = re.compile(r"(?<![\w/.+-])(?:(?:proxy|haproxy|ssl|tcp6?|unix|systemd):)+[^\s`\"',;|)]*")
_BARE = re.compile(r"`([\w.*:-]*(?:\[[^`\s]*\])?:(?:8080|9090|8443)[^`\s]*)`")


def shown(text: str) -> list[str]:
    """Return the descriptions in a text, with values for `…` and systemd's `%d`; `ssl:` alone is the name of a type."""
    found = [*_TYPED.findall(text), *_BARE.findall(text)]
    # In a log line a colon may follow the name of a listener.
    found = [example.removesuffix(":") if re.search(r"\d\d:$|/.*:$", example) else example for example in found]
    found = [example.replace(":…", ":certificates=/dir").replace("%d", "/d").rstrip(".") for example in found]
    return [example for example in found if not re.fullmatch("((proxy|haproxy|ssl|tcp6?|unix):)+", example)]


SOURCES = {
    "docs": "\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))),
    "help": "\n".join(f"{setting.help}\n{setting.details}" for setting in all_settings()),
    "errors": FORMS,
    **{
        str(path.relative_to(ROOT)): path.read_text(errors="replace")
        for path in sorted((ROOT / "etc").rglob("*"))
        if path.is_file() and path.suffix in (".toml", ".service", ".conf", ".socket", ".cfg", ".yml")
    },
}
SHOWN = sorted({(source, example) for source, text in SOURCES.items() for example in shown(text)})


@pytest.mark.parametrize(("source", "description"), SHOWN)
def test_every_documented_description_is_accepted(source: str, description: str) -> None:
    if description in REFUSED:
        with pytest.raises(ListenError):
            parse(description)
        return
    for loopback in (False, True):
        assert read_description(description, backlog=5, resolve_path=os.path.abspath, loopback=loopback)


def test_the_documentation_shows_each_type_and_each_form_of_an_address() -> None:
    for source in ("docs", "help"):
        found = {example for where, example in SHOWN if where == source}
        assert {"tcp:8080", "tcp6:8080:interface=::1", "127.0.0.1:8080", "[::1]:8080"} <= found
        kinds = {(*parse(example).prefixes, parse(example).kind) for example in found - REFUSED}
        assert {("tcp",), ("tcp6",), ("ssl",), ("unix",), ("systemd",)} <= kinds
    assert {"*:8080", ":8080", "localhost:8080", "::1:8080", r"proxy:ssl:8443:certificates=/dir"} <= {
        example for where, example in SHOWN if where == "docs"
    }
