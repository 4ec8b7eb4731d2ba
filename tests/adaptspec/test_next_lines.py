"""The lines that a tune ends with work as they are typed."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import adaptspec
from adaptspec.cli import build_cli
from adaptspec.host import Host
from adaptspec.next_lines import next_lines

_folder = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cc"]), min_size=1
)


class Loaded(Exception):
    """Ends what the lines do after loading."""


def asked_by(lines: Any, host: Host) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the command and the Python lines ask of ``load``, in this order."""
    found = []

    def load(*given: Any, **named: Any) -> None:
        found.append((given, named))
        raise Loaded

    with patch("adaptspec.decoder.load", load):
        words = shlex.split(lines.command)
        assert words[:2] == ["adaptspec", "generate"]
        done = CliRunner().invoke(build_cli(host), words[1:])
        assert isinstance(done.exception, Loaded), done.output
        with patch.object(adaptspec, "load", load, create=True):
            with pytest.raises(Loaded):
                exec("\n".join(lines.python), {})
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"model": "m"},
        {"model": "m", "draft_model": "d", "dtype": "bfloat16", "threads": 3},
        {"model": "it's here", "heads": ["a b", Path("c")], "device": "cpu"},
        {"model": "m", "db": "my.db", "trust_remote_code": True, "raw": True},
        {"model": "m", "prompt": "--model"},
    ],
    ids=str,
)
def test_both_ask_for_what_was_tuned_with(options: dict[str, Any]) -> None:
    command, python = asked_by(next_lines(**options), Host({}))
    (model, draft, db), named = command
    assert (model, draft, db) == (
        options["model"],
        options.get("draft_model"),
        options.get("db"),
    )
    assert python[0] == ()
    everything = {**named, "model": model, "draft_model": draft, "db": db}
    for name, value in python[1].items():
        asked = everything[name]
        assert (list(asked) if name == "heads" else asked) == value
    for name, value in options.items():
        if name not in ("raw", "prompt", "model"):
            expected = [str(v) for v in value] if name == "heads" else value
            assert python[1][name] == expected


def test_what_is_the_default_is_not_named() -> None:
    lines = next_lines()
    assert lines.command == "adaptspec generate 'Why is the sky blue?'"
    assert lines.python[:2] == ("import adaptspec", "decoder = adaptspec.load()")


@given(_folder, _folder, _folder)
def test_any_names_can_be_typed(model: str, heads: str, prompt: str) -> None:
    lines = next_lines(model, heads=[heads], prompt=prompt)
    words = shlex.split(lines.command)
    assert words[words.index("--model") + 1] == model
    assert words[-1] == prompt
    tree = ast.parse("\n".join(lines.python))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert {model, heads, prompt} <= texts
