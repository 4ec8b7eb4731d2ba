"""The examples of the pages are whole, work, and are what is shipped."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import adaptspec_profiles.plugin
from adaptspec import hookspecs
from adaptspec.cli import build_cli
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.environment import environment_of
from adaptspec.errors import EngineError, HeadsLoadError
from adaptspec.host import Host
from adaptspec.testing import InferenceEngineContract
from adaptspec.testing.fakes import (
    hf_greedy,
    random_ids,
    tiny_model,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec.workloads import Prompt
from adaptspec_profiles.memory import MemoryStore
from adaptspec_profiles.sql import SqlStore

DOCS = Path(__file__).parents[1] / "docs"


def code(page: str, section: str) -> str:
    """The Python block of a section, named by what its heading starts with."""
    text = (DOCS / page).read_text().split(f"\n## {section}", 1)[1]
    return text.split("\n## ", 1)[0].split("```python\n", 1)[1].split("```", 1)[0]


@pytest.fixture
def host() -> Host:
    """The plugins of hooks.md beside the first-party store."""
    plugins: dict[str, Any] = {"profiles": adaptspec_profiles.plugin}
    for hook in HOOKS:
        module = types.ModuleType(hook)
        exec(code("hooks.md", f"`{hook}("), vars(module))
        plugins[hook] = module
    found = Host(plugins)
    assert [p.error for p in found.plugins] == [None] * len(plugins)
    return found


HOOKS = [n for n, f in vars(hookspecs).items() if hasattr(f, "adaptspec_spec")]


def test_the_strategy_of_the_page_drafts_and_changes_nothing(host: Host) -> None:
    model = tiny_model("llama")
    prompt = random_ids(9)
    for limit in (1, 2, 30):
        run = Engine(model, None).generate(
            host.create("repeat"), prompt, Controls(max_new_tokens=limit)
        )
        assert run.token_ids == hf_greedy(model, prompt, limit)
    assert run.stats.proposed > 0


def test_the_baseline_of_the_page_says_what_generate_says(host: Host) -> None:
    model = tiny_model("llama")
    prompt = random_ids(9)
    run = host.baselines["no_cache"]().run(model, None, prompt, 7)
    assert run.token_ids == hf_greedy(model, prompt, 7)
    assert run.tokens_per_second > 0


def test_the_engine_of_the_page_asks_its_program(host: Host, tmp_path: Path) -> None:
    program = "import sys; print(*(sys.stdin.read().split() * 9)[: int(sys.argv[1])])"
    options = EngineOptions(
        engine="one-shot", command=sys.executable, arguments=["-c", program]
    )
    contract = InferenceEngineContract()
    contract.options = options
    with host.engines["one-shot"].open(options) as engine:
        contract.test_answers_come_in_order_and_are_as_long_as_asked(engine)
        contract.test_it_says_how_it_is_started_or_that_it_is_not(engine)
        (answer,) = engine.answer("autoregressive", {}, [Prompt("a", text="b c")], 3)
    assert answer.text == "b c b\n"
    with pytest.raises(EngineError, match="needs its program"):
        host.engines["one-shot"].open(EngineOptions(engine="one-shot"))


def test_the_command_of_the_page_counts(host: Host) -> None:
    done = CliRunner().invoke(build_cli(host), ["count"], obj=host)
    assert done.output.strip() == str(len(host.strategies)) == "1"


def test_the_store_of_the_page_takes_its_url_and_leaves_others(
    host: Host, tmp_path: Path
) -> None:
    assert isinstance(host.open_store("scratch:"), MemoryStore)
    store = host.open_store(str(tmp_path / "p.db"))
    assert isinstance(store, SqlStore)
    store.close()


def test_the_heads_of_the_page_are_read_or_left_or_refused(
    host: Host, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with pytest.raises(HeadsLoadError, match="no plugin reads the heads"):
        host.open_heads(tmp_path, model)
    file = tmp_path / "favourites.txt"
    file.write_text(" ".join("3" * model.vocab_size))
    model.attach(host.open_heads(tmp_path, model))
    place = environment_of(model, None)
    assert place.heads == model.heads["favourites"].digest
    assert place.heads_name == tmp_path.name
    file.write_text("3 3")
    with pytest.raises(HeadsLoadError, match="tokens expected, got 2"):
        host.open_heads(tmp_path, model)


@pytest.mark.slow
def test_the_lines_of_the_page_of_generate_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "drop-in.md").read_text()
    bound, single, stopped = [
        block.split("```", 1)[0] for block in page.split("```python\n")[1:]
    ]
    tokenizer = tiny_tokenizer()
    tiny_module("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(
        "adaptspec.host.Host.open_store", lambda self, url=None: MemoryStore()
    )
    names: dict[str, Any] = {
        "NAME": str(tmp_path),
        "TEXT": "w5 w6 w7 w5 w6",
        "enough": lambda piece: True,
    }
    with pytest.warns(UserWarning, match="plain decoding"):
        exec(bound, names)
    speedup, output = names["speedup"], names.pop("output")
    assert [len(row.token_ids) for row in speedup.decoder.last] == [200]
    speedup.restore()
    with pytest.warns(UserWarning, match="plain decoding"):
        exec(single, names)
    assert torch.equal(names["output"], output)
    speedup.bind()
    exec(stopped, names)
    names["thread"].join(60)
    [row] = speedup.decoder.last
    assert 0 < len(row.token_ids) <= 200


@pytest.mark.slow
def test_the_lines_of_the_page_of_tuning_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = code("tuning.md", "From Python")
    few = 'budget_trials=1, trials=1, strategies=["prompt_lookup"]'
    assert "budget=1200" in lines
    for name in ("my-model", "my-small-model"):
        tiny_module("llama").save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    prompts = [
        {"class": "chat", "prompt": f"w{i} w3 w4 w3", "max_new_tokens": 6}
        for i in range(2, 6)
    ]
    rows = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTSPEC_DB", str(tmp_path / "p.db"))
    names: dict[str, Any] = {}
    exec(lines.replace("budget=1200", few), names)
    assert {found.name for found in names["result"].classes} == {"chat"}
    assert "autoregressive 1.0 " in capsys.readouterr().out


@pytest.mark.parametrize("section", ["1.", "2.", "3.", "4."])
def test_the_tutorial_shows_what_the_example_package_ships(section: str) -> None:
    package = DOCS / "examples" / "adaptspec-echo"
    shipped = "\n".join(f.read_text() for f in sorted(package.rglob("*.py")))
    pieces = code("writing-a-plugin.md", section).split("\n\n")
    for piece in pieces:
        assert piece.strip() in shipped


def command_lines() -> list[tuple[str, str]]:
    """Page and command of every line of the pages that calls us, and of benchmarks."""
    root = DOCS.parent
    found = []
    for page in [root / "README.md", *DOCS.rglob("*.md")]:
        text = page.read_text().replace("\\\n", " ")
        lines = re.findall(r"^    (adaptspec .*)$", text, re.MULTILINE)
        lines += re.findall(r"`(adaptspec [a-z]+ [^`]*)`", text)
        found += [(page.name, line) for line in lines]
    for script in sorted((root / "benchmarks").glob("*.py")):
        said = ast.get_docstring(ast.parse(script.read_text())) or ""
        lines = re.findall(r"^ {4}(?:\S+=\S+ )?(adaptspec .*)$", said, re.MULTILINE)
        found += [(script.name, line) for line in lines]
    return found


def test_commands_of_the_pages_have_the_options_they_are_given() -> None:
    """Options in brackets are looked at, too; paths and values aren't."""
    cli = build_cli(Host.installed())
    lines, wrong = command_lines(), []
    assert len(lines) > 40
    for page, line in lines:
        first = re.split(r" [|>] ", line)[0]
        words = shlex.split(re.sub(r"[\[\]]", " ", first), comments=True)
        command: click.Command = cli
        context = click.Context(cli, info_name=words.pop(0))
        while isinstance(command, click.Group) and words:
            name = words.pop(0).split("|")[0]
            found = command.get_command(context, name)
            assert found is not None, (page, line)
            command = found
            context = click.Context(command, info_name=name, parent=context)
        given = [word for word in words if word not in ("...", "…")]
        try:
            _, rest, _ = command.make_parser(context).parse_args(given)
        except click.UsageError as error:
            wrong.append((page, line, error.format_message()))
            continue
        if rest:
            wrong.append((page, line, f"not taken: {rest}"))
    assert not wrong
