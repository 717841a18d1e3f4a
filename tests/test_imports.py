"""Imports go one way, from upper to lower parts."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import PACKAGE

# The parts that each part may import besides itself. A file that imports more than its package has a separate entry.
MAY_IMPORT = {
    "events": set(),
    "steps": set(),
    "interfaces": set(),
    "counted": set(),
    "escaping": set(),
    "suggestions": set(),
    "utf8": set(),
    "hidden": set(),
    "log_rate": set(),
    "references": set(),
    "histogram": set(),
    "protocols": {"events", "interfaces", "counted"},
    "net": {"steps", "events", "interfaces", "suggestions", "utf8", "counted", "escaping"},
    "hub": {"events", "interfaces", "escaping", "hidden", "log_rate", "histogram"},
    "hub/redis_url": {"interfaces", "hidden"},
    "observe": {"escaping", "events"},
    "config": {"hub/redis_url", "escaping", "hidden", "references", "suggestions", "utf8"},
    "hosting": {"config", "protocols", "escaping", "references", "hidden", "interfaces", "suggestions", "utf8"},
    "process": {"steps", "events", "hub", "net", "interfaces", "counted", "escaping", "log_rate", "histogram"},
    "process_settings": {"process", "config", "observe"},
    "pool": {"steps", "events", "process", "hub", "net", "counted", "escaping"},
    "pool/start_message": {"steps", "net", "config", "references"},
    "pool/worker": {
        "steps",
        "events",
        "hub",
        "process",
        "process_settings",
        "net",
        "hosting",
        "config",
        "references",
        "observe",
        "counted",
    },
    "startup": {
        "steps",
        "events",
        "process_settings",
        "process",
        "pool",
        "hub",
        "net",
        "observe",
        "config",
        "escaping",
        "hidden",
        "references",
        "suggestions",
        "hosting",
    },
    "testing": {"hub", "interfaces", "net", "pool"},
    "first": {"process"},
    "tap": {
        "escaping",
        "hub",
        "first",
        "hosting",
        "config",
        "suggestions",
        "process_settings",
        "observe",
        "startup",
        "pool",
        "process",
        "net",
        "",
    },
    "__init__": set(),
}


def part_of(path: Path) -> str:
    """Return the key of MAY_IMPORT for a module."""
    whole = path.relative_to(PACKAGE).with_suffix("").as_posix()
    return whole if whole in MAY_IMPORT else whole.partition("/")[0]


def parts_imported(path: Path) -> set[str]:
    """Return the parts of rtservice that a module imports, also in functions; `` is the package itself.

    A file that has a separate entry is such a part, if the module imports names from it.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "rtservice":
            names = [f"rtservice.{alias.name}" if alias.name.islower() else "rtservice" for alias in node.names]
            names = ["rtservice" if name.startswith("rtservice.__") else name for name in names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package, *path = name.split(".")
            if package == "rtservice":
                found.add("/".join(path) if "/".join(path) in MAY_IMPORT else [*path, ""][0])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_allowed_parts(path: Path) -> None:
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part.partition("/")[0]}
    assert {found for found in parts_imported(path) if not {found, found.partition("/")[0]} & allowed} == set()


def modules_imported(path: Path) -> set[str]:
    """Return the modules of rtservice that a module imports, also in functions."""
    known = {".".join(each.relative_to(PACKAGE.parent).with_suffix("").parts) for each in PACKAGE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


@pytest.mark.parametrize("part", ["net", "process", "pool", "startup"])
def test_the_modules_of_a_part_have_no_circular_imports(part) -> None:
    imports = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): modules_imported(path)
        for path in (PACKAGE / part).glob("*.py")
    }
    while imports:
        free = {module for module, needed in imports.items() if not needed & imports.keys()}
        assert free, f"circular import among {sorted(imports)}"
        imports = {module: needed for module, needed in imports.items() if module not in free}


# Methods with at least this number of statements, not counting the docstring, are compared.
MIN_STATEMENTS = 3


def methods(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the normalised body of each method of a module that is long enough to compare."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                body = method.body[ast.get_docstring(method) is not None :]
                if sum(isinstance(inner, ast.stmt) for outer in body for inner in ast.walk(outer)) >= MIN_STATEMENTS:
                    # `self.log` and `self._log` are equal: private names differ between classes.
                    yield f"{node.name}.{method.name}", "\n".join(map(ast.unparse, body)).replace("self._", "self.")


def test_process_and_pool_have_no_duplicate_methods() -> None:
    seen: dict[str, str] = {}
    for path in sorted([*(PACKAGE / "process").glob("*.py"), *(PACKAGE / "pool").glob("*.py")]):
        for name, body in methods(path):
            assert body not in seen, f"{name} and {seen[body]}"
            seen[body] = name


def test_no_class_is_assigned_to_an_object() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "__class__":
                assert not isinstance(node.ctx, ast.Store), f"{path}:{node.lineno}"


def test_the_plugin_names_its_modules_as_strings() -> None:
    plugin = PACKAGE.parent / "twisted" / "plugins" / "rtservice_plugin.py"
    assert parts_imported(plugin) == set()


def test_a_class_name_has_one_meaning_in_the_package() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
