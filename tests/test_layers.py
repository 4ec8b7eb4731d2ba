"""Imports point inward, and what must be light is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adaptspec

CORE = Path(adaptspec.__file__).parent
SATELLITES = (
    "adaptspec_plugins",
    "adaptspec_profiles",
    "adaptspec_training",
    "adaptspec_tuner",
)
HEAVY = ("torch", "transformers", "optuna", "sqlalchemy", "numpy")


def imported(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_core_imports_no_satellite() -> None:
    files = sorted(CORE.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & set(SATELLITES), path


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
