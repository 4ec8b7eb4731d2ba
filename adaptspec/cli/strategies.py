"""``adaptspec strategies``: lists strategies, their parameters and their plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adaptspec.cli.output import print_json, stdout_console
from adaptspec.host import Host

if TYPE_CHECKING:
    from adaptspec.strategy import Baseline, Strategy


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def strategies(host: Host, name: str | None, as_json: bool) -> None:
    """List strategies and baselines, or describe one with its parameters."""
    described = describe(host)
    if name is not None:
        listed = [*described["strategies"], *described["baselines"]]
        found = [item for item in listed if item["name"] == name]
        if not found:
            host.strategy(name)  # raises, naming the known ones
        described = found[0]
    if as_json:
        print_json(described)
    elif name is not None:
        _print_one(described)
    else:
        _print_all(described)


def describe(host: Host) -> dict[str, Any]:
    """Everything the listing shows, JSON-ready."""
    return {
        "strategies": [_item(host, cls) for _, cls in sorted(host.strategies.items())],
        "baselines": [_item(host, cls) for _, cls in sorted(host.baselines.items())],
        "plugins": [
            {
                "name": info.name,
                "version": info.version,
                "hooks": list(info.hooks),
                "error": info.error,
            }
            for info in host.plugins
        ],
    }


def _item(host: Host, cls: type[Strategy] | type[Baseline]) -> dict[str, Any]:
    needs = []
    if cls.requires.draft == "same vocabulary":
        needs.append("a draft model with the target's vocabulary")
    if cls.requires.draft == "another tokenizer":
        needs.append("a draft model with another tokenizer")
    if cls.requires.heads is not None:
        needs.append(f"{cls.requires.heads} heads trained for the target")
    if cls.requires.trees:
        needs.append("tree attention")
    return {
        "name": cls.name,
        "summary": cls.summary,
        "reference": cls.reference,
        "plugin": host.origin(cls.name),
        "needs": needs,
        "lossless": getattr(cls, "lossless", True),
        "parameters": [spec.as_json() for spec in cls.Params.specs()],
    }


def _print_all(described: dict[str, Any]) -> None:
    from rich.table import Table

    console = stdout_console()
    for title in ("strategies", "baselines"):
        table = Table(title=title.capitalize(), title_justify="left", box=None)
        for column in ("name", "what it does", "needs", "parameters", "plugin"):
            table.add_column(column)
        for item in described[title]:
            lossy = "" if item["lossless"] else " [LOSSY]"
            table.add_row(
                item["name"] + lossy,
                item["summary"],
                ", ".join(item["needs"]) or "-",
                ", ".join(p["name"] for p in item["parameters"]) or "-",
                item["plugin"],
            )
        console.print(table)
        console.print()
    for plugin in described["plugins"]:
        if plugin["error"]:
            console.print(
                f"plugin {plugin['name']} {plugin['version']} left out: "
                f"{plugin['error']}",
                markup=False,
            )


def _print_one(item: dict[str, Any]) -> None:
    from rich.table import Table

    console = stdout_console()
    console.print(f"{item['name']}: {item['summary']}", markup=False)
    if not item["lossless"]:
        console.print(
            "LOSSY: changes the distribution of sampled output; chosen only "
            "where allowed",
            markup=False,
        )
    if item["reference"]:
        console.print(f"source: {item['reference']}", markup=False)
    if item["needs"]:
        console.print(f"needs: {', '.join(item['needs'])}", markup=False)
    table = Table(box=None)
    for column in ("parameter", "default", "tuned over", "what it is"):
        table.add_column(column)
    for p in item["parameters"]:
        if "choices" in p:
            over = " | ".join(str(choice) for choice in p["choices"])
        elif "low" in p:
            over = f"{p['low']:g}..{p['high']:g}"
        else:
            over = "-"
        table.add_row(
            p["name"],
            str(p["default"]),
            over if p["tuned"] else "-",
            p["description"],
        )
    console.print(table)
