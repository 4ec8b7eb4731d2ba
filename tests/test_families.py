"""The table of model families tells right outputs from wrong ones, and survives all."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptspec.decoding import engine
from adaptspec.decoding.acceptance import Accepted, accept_matching
from adaptspec.host import Host
from adaptspec.model.forward import Forward
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import tiny_module

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def checks() -> Any:
    return benchmark("family_checks")


def run(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after the statements ``first``."""
    program = f"import families, family_checks\n{first}\nfamilies.main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments, "--jobs", "1"],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_model_with_a_tower_that_knows_one_attention_is_loaded() -> None:
    module = benchmark("tiny_families").tiny_module("gemma4")
    towers = {type(part).__name__: part for part in module.modules()}
    model = LanguageModel(module)
    assert model.capability.level == "tree"
    tower = towers["Gemma4AudioModel"].config._attn_implementation
    assert module.config._attn_implementation == "sdpa" != tower


@pytest.mark.slow
def test_families_are_built_compared_and_put_in_a_table(tmp_path: Path) -> None:
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    done = run(
        *("--only", "bloom,mamba,musicgen", "--dtype", "float32"),
        *("--markdown", str(page), "--json", str(numbers)),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(numbers.read_text())
    reports = {row["name"]: row["report"] for row in found["families"]}
    assert {name: report["level"] for name, report in reports.items()} == {
        "bloom": "chains",
        "mamba": "plain",
        "musicgen": "not built",
    }
    assert reports["bloom"]["accepted"] > 0
    assert reports["bloom"]["varied"] >= 4
    for name in ("bloom", "mamba"):
        assert reports[name]["compared"] == reports[name]["equal"] > 0
    text = page.read_text()
    assert f"| bloom | BloomForCausalLM | chains | {reports['bloom']['compared']} " in (
        text
    )
    assert f"transformers {found['versions']['transformers']}" in text
    assert "float32: 1 chains, 1 plain, 1 not built" in done.stdout


@pytest.mark.slow
def test_an_engine_that_believes_its_drafts_is_found_out(
    checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every first child is accepted, whatever the target says."""

    def believe(tree: Any, choose: Any) -> Any:
        accepted = accept_matching(tree, choose)
        if len(accepted.path) == 1 and tree.children[0]:
            return Accepted([0, tree.children[0][0]], accepted.token)
        return accepted

    monkeypatch.setattr(engine, "accept_matching", believe)
    names = ["autoregressive", "draft_model", "prompt_lookup"]
    prompts = [(5, 9, 33), (4, 8, 5) * 3]
    report = checks.check(tiny_module("gpt2"), Host.installed(), prompts, names)
    assert set(report.wrong) == {"draft_model", "prompt_lookup"}
    assert report.wrong["draft_model"][0].startswith("greedy after 3: ")
    assert report.equal < report.compared


@pytest.mark.slow
def test_a_plain_step_that_is_wrong_is_found_out(
    checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token's logits, which no draft has to do with."""
    prefill = LanguageModel.prefill

    def shifted(self: LanguageModel, *args: Any, **options: Any) -> Forward:
        forward = prefill(self, *args, **options)
        return replace(forward, logits=forward.logits.roll(1, -1))

    module = tiny_module("gpt2")
    model = LanguageModel(module)
    assert model.capability.level == "tree"
    monkeypatch.setattr(checks, "LanguageModel", lambda _: model)
    monkeypatch.setattr(LanguageModel, "prefill", shifted)
    report = checks.check(module, Host.installed(), [(5, 9, 33)], ["autoregressive"])
    assert "autoregressive" in report.wrong


@pytest.mark.slow
def test_a_family_that_kills_its_process_or_hangs_ends_nothing_else() -> None:
    hostile = """
import os, time
def examine(name, dtype, host):
    if name == "gpt2":
        os.kill(os.getpid(), 9)
    if name == "llama":
        time.sleep(60)
    return families.Report("plain")
families.examine = examine
"""
    done = run(
        *("--only", "gpt2,llama,opt", "--dtype", "float32", "--seconds", "2"),
        first=hostile,
    )
    assert done.returncode == 1
    assert "process: the process died: SIGKILL" in done.stdout
    assert "process: not done after" in done.stdout
    assert "float32: 2 WRONG (crashed), 1 plain" in done.stdout


def test_only_tokens_as_likely_but_for_rounding_are_ties(checks: Any) -> None:
    ids = (5, 9, 33)
    module = tiny_module("llama")
    expected = checks.Reference(module).greedy(ids)
    last = expected[-1]
    twin, other = [token for token in range(2, 20) if token not in expected][:2]
    with torch.no_grad():
        # The later of two equals is as right as the first, and never generate's.
        module.lm_head.weight[twin] = module.lm_head.weight[last]
    low, high = sorted((last, twin))
    reference = checks.Reference(module)
    assert reference.greedy(ids) == (*expected[:-1], low)

    def judged(token: int) -> str:
        tokens = (*expected[:-1], token)
        seen = checks.Seen(list(reference.logits(ids, tokens)))
        verdict: str = checks._judge_greedy(
            checks.Report(), reference, ids, tokens, seen
        )
        return verdict

    assert judged(low) == "equal"
    assert judged(high) == "tie"
    assert "behind" in judged(other)


def test_logits_that_are_off_are_told_though_the_tokens_are_right(checks: Any) -> None:
    ids = (5, 9, 33)
    reference = checks.Reference(tiny_module("llama"))
    tokens = reference.greedy(ids)
    logits = [row.clone() for row in reference.logits(ids, tokens)]
    logits[4] += torch.linspace(0, 0.5, len(logits[4]))
    seen = checks.Seen(logits)
    verdict = checks._judge_greedy(checks.Report(), reference, ids, tokens, seen)
    assert "logits before token 4" in verdict


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_measured_and_small(checks: Any, dtype: str) -> None:
    module = tiny_module("llama").to(getattr(torch, dtype))
    reference = checks.Reference(module)
    tokens = reference.greedy((5, 9, 33))
    logits = reference.logits((5, 9, 33), tokens)
    spread = float(logits.max() - logits.min())
    noise = reference.noise((5, 9, 33), tokens)
    assert 0 < noise < 30 * torch.finfo(module.dtype).eps * spread
