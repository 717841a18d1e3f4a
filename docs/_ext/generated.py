"""Generate reference text from the code: a line `% generated: NAME` in a page is replaced by the text NAME."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from zope.interface.interface import Attribute, InterfaceClass, Method

from rtservice import interfaces, testing
from rtservice.config.render import reference
from rtservice.config.schema import all_settings
from rtservice.events import AREAS, EVENTS, FIELDS
from rtservice.hosting.aliases import ALIASES
from rtservice.observe import metrics
from rtservice.observe.status_source import StatusSource

_MARK = re.compile(r"^% generated: (\w+)$", re.MULTILINE)


def _interfaces() -> str:
    """Return every interface of rtservice.interfaces, with its methods, as directives of Sphinx's Python domain."""
    found = [value for value in vars(interfaces).values() if isinstance(value, InterfaceClass)]
    described = []
    for interface in found:
        if interface.__module__ != interfaces.__name__:
            continue
        described.append(
            _directive(
                "class", interface.getName(), interface.getDoc(), *map(_member, interface.namesAndDescriptions())
            )
        )
    return _restructured(f".. py:currentmodule:: {interfaces.__name__}", *described)


def _member(named: tuple[str, Attribute]) -> str:
    name, described = named
    if isinstance(described, Method):
        return _directive("method", f"{name}{described.getSignatureString()}", described.getDoc())
    return _directive("attribute", name, described.getDoc())


def _fixtures() -> str:
    """Return the pytest fixtures of rtservice.testing."""
    return _restructured(
        f".. py:currentmodule:: {testing.__name__}",
        # A test calls the value of the fixture with these arguments.
        _directive("function", "serve(factory, tls=None)", _docstring(testing.serve)),
        _directive("data", "hub", _docstring(testing.hub)),
        _directive("function", "hubs(count)", _docstring(testing.hubs)),
        _directive("function", "hosted(protocol, *arguments, **environment)", _docstring(testing.hosted)),
    )


def _docstring(fixture: Any) -> str:
    return inspect.getdoc(inspect.unwrap(getattr(fixture, "_get_wrapped_function", lambda: fixture)())) or ""


def _directive(kind: str, signature: str, text: str, *more: str) -> str:
    body = "\n\n".join((inspect.cleandoc(text), *more))
    return f".. py:{kind}:: {signature}\n\n{textwrap.indent(body, '   ')}"


def _restructured(*parts: str) -> str:
    # The docstrings are reStructuredText.
    return "\n\n".join(("```{eval-rst}", *parts, "```"))


def _events() -> str:
    """Return a table of events for each area, and a table of all fields."""
    parts = []
    for area, words in AREAS.items():
        rows = [
            f"| `{event.name}` | {event.level.name} | {', '.join(f'`{field}`' for field in event.fields)} | "
            f"{event.meaning}<br>`{_in_one_line(event.text)}` |"
            for event in EVENTS.values()
            if event.name.partition(".")[0] in words
        ]
        parts.append(
            "\n".join((f"## {area}\n", "| event | level | fields | meaning and text |", "|---|---|---|---|", *rows))
        )
    fields = [f"| `{name}` | {_type_names(field.types)} | {field.meaning} |" for name, field in FIELDS.items()]
    parts.append("\n".join(("## Fields\n", "| field | type | meaning |", "|---|---|---|", *fields)))
    return "\n\n".join(parts)


_TYPES = {str: "text", int: "integer", float: "number", type(None): "null"}


def _type_names(types: tuple[type, ...]) -> str:
    return " or ".join(
        _TYPES[kind] for kind in types if kind is not int or float not in types
    )  # an integer is a number


def _in_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _metrics() -> str:
    """Return a table of every metric of /metrics, without those of hosted protocols."""
    source: Any = StatusSource(
        version="",
        standing=lambda: (True, ""),
        overview=lambda: {
            **dict.fromkeys(("state", "ready", "status", "time", "started"), 0),
            **{"listeners": [], "certificates": [], "workers": [], "supervisor": None, "starts": {}, "exits": {}},
        },
        rows=lambda sort, count: None,  # type: ignore[arg-type, return-value]  # not called
        settings=dict,
        refresh=lambda: None,  # type: ignore[arg-type, return-value]  # not called
        hosts=frozenset,
        columns=(),
        durations=(1.0,),
        lags=(1.0,),
        heartbeats=(1.0,),
    )
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in metrics.families(source):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
        lines.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines)


_GENERATED: dict[str, Callable[[], str]] = {
    "settings": lambda: reference(all_settings(ALIASES)),
    "interfaces": _interfaces,
    "fixtures": _fixtures,
    "metrics": _metrics,
    "events": _events,
}


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    def generate(match: re.Match[str]) -> str:
        if match[1] not in _GENERATED:
            raise ExtensionError(f"{page}: nothing is generated under the name {match[1]!r}")
        return _GENERATED[match[1]]()

    source[0] = _MARK.sub(generate, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}
