"""Imports point inward, without circles, and what must be light is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = (
    "adaptspec",
    "adaptspec_plugins",
    "adaptspec_profiles",
    "adaptspec_training",
    "adaptspec_tuner",
)
HEAVY = ("torch", "transformers", "optuna", "sqlalchemy", "numpy")


def source_files() -> dict[str, Path]:
    """Module name -> file, of all packages."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, modules: Mapping[str, object]) -> set[str]:
    """Those of ``modules`` that a file imports, wherever in it and for whatever."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in modules else node.module)
    return names & set(modules)


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in graph[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        reached[start] = seen
    found = []
    for name in graph:
        circle = {other for other in reached[name] if name in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


FILES = source_files()
GRAPH = {
    name: imports(path.read_text(), FILES) - {name} for name, path in FILES.items()
}


def test_every_package_was_read() -> None:
    assert {name.split(".")[0] for name in FILES} == set(PACKAGES)
    assert len(FILES) > 100


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Lazy imports and those for types alone count."""
    assert circles(GRAPH) == []


def test_a_circle_of_lazy_and_type_only_imports_is_found() -> None:
    modules = {"a": 0, "b": 0, "c": 0}
    lazy = "def f():\n    from b import x\n"
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\n"
    graph = {"a": imports(lazy, modules), "b": imports(for_types, modules), "c": {"a"}}
    assert circles(graph) == [{"a", "b"}]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_the_core_and_no_other_package(package: str) -> None:
    for name, imported in GRAPH.items():
        if name.split(".")[0] == package:
            roots = {other.split(".")[0] for other in imported}
            assert roots <= {"adaptspec", package}, name


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["tune", "--help"], ["train", "medusa", "--help"], ["--version"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from adaptspec.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert done.stderr.strip().splitlines()[-1] == "[]"
