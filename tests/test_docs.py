"""What can be used is documented."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import click
import pytest
import transformers
from transformers.models.auto import modeling_auto

import adaptspec_plugins
import adaptspec_profiles.plugin
import adaptspec_training.plugin
import adaptspec_tuner.plugin
from adaptspec import hookspecs
from adaptspec.cli import build_cli
from adaptspec.host import Host
from adaptspec.workloads import read_workload

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(
        {
            "bundled": adaptspec_plugins,
            "profiles": adaptspec_profiles.plugin,
            "training": adaptspec_training.plugin,
            "tuner": adaptspec_tuner.plugin,
        }
    )


def test_every_hook_is_documented_with_its_arguments() -> None:
    page = (DOCS / "hooks.md").read_text()
    hooks = {
        name: function
        for name, function in vars(hookspecs).items()
        if hasattr(function, "adaptspec_spec")
    }
    assert len(hooks) >= 3
    for name, function in hooks.items():
        arguments = ", ".join(inspect.signature(function).parameters)
        assert f"`{name}({arguments})`" in page


def test_every_strategy_and_parameter_is_documented(host: Host) -> None:
    page = (DOCS / "strategies.md").read_text()
    classes: dict[str, Any] = {**host.strategies, **host.baselines}
    assert len(classes) >= 7
    for name, cls in classes.items():
        section = page.split(f"## `{name}`", 1)[1].split("\n## ", 1)[0]
        for spec in cls.Params.specs():
            assert spec.description, f"{name}.{spec.name} says nothing of itself"
            assert f"| `{spec.name}` | {spec.default} |" in section
    readme = (DOCS.parent / "README.md").read_text()
    for name in host.strategies:
        assert f"`{name}`" in readme


def test_every_command_and_option_is_documented(host: Host) -> None:
    page = (DOCS / "cli.md").read_text()

    def check(command: click.Command, path: str) -> None:
        section = page.split(f"## `{path}`", 1)[1].split("\n## ", 1)[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[-1] in section, (path, parameter.name)
                assert parameter.help, (path, parameter.name)
        for name, child in getattr(command, "commands", {}).items():
            check(child, f"{path} {name}")

    check(build_cli(host), "adaptspec")


def test_every_row_of_the_page_of_workloads_is_read(tmp_path: Path) -> None:
    page = (DOCS / "workloads.md").read_text()
    rows = re.findall(r"^\| .* \| `(\{.*\})` \|$", page, re.MULTILINE)
    assert len(rows) == page.count("| `{")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    workload = read_workload(path)
    assert len(workload.prompts) == len(rows) >= 7
    assert workload.notes == ()


def test_every_family_of_its_transformers_is_in_the_table_of_families() -> None:
    page = (DOCS / "families.md").read_text()
    assert "python benchmarks/families.py" in page
    assert "WRONG" not in page
    if f"transformers {transformers.__version__}," in page:
        for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            assert f"| {name} |" in page


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        for piece in page.read_text().split("](")[1:]:
            target = piece.split(")", 1)[0]
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)
