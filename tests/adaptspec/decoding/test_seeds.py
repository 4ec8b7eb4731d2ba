"""Sampling is random unless a seed is given, and repeats where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptspec
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Generation
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.strategy import Context, TokenTree
from adaptspec.testing.fakes import (
    VOCAB,
    ScriptedStrategy,
    random_ids,
    tiny_model,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec_profiles.memory import MemoryStore

PROMPT = random_ids(8)
LENGTH = 25


def sample(
    prompt: list[int], seed: int | None, truth: list[int] | None = None
) -> Generation:
    def script(context: Context) -> TokenTree:
        done = len(context.ids) - len(prompt)
        return TokenTree.chain(context.ids[-1], (truth or [])[done : done + 3])

    controls = Controls(LENGTH, temperature=1.0, seed=seed)
    return Engine(tiny_model("llama")).generate(
        ScriptedStrategy(script), prompt, controls
    )


@pytest.mark.slow
def test_runs_without_a_seed_differ_and_their_seeds_repeat_them() -> None:
    runs = [sample(PROMPT, None) for _ in range(8)]
    assert len({tuple(run.token_ids) for run in runs}) == 8
    assert len({run.seed for run in runs}) == 8
    for run in runs[:3]:
        assert run.seed is not None
        assert sample(PROMPT, run.seed).token_ids == run.token_ids
        assert sample(PROMPT, run.seed, run.token_ids).token_ids == run.token_ids


@pytest.mark.slow
def test_torchs_seed_makes_runs_without_a_seed_repeat() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(11)
        found.append([sample(PROMPT, None).token_ids for _ in range(3)])
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) == 3


def test_greedy_decoding_draws_no_seed() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    silent = ScriptedStrategy(lambda context: TokenTree.root_only(context.ids[-1]))
    engine = Engine(tiny_model("llama"))
    state = torch.get_rng_state()
    assert engine.generate(silent, PROMPT, Controls(4)).seed is None
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.generate(silent, PROMPT, Controls(4, seed=3)).seed == 3


@pytest.mark.slow
def test_prompts_of_one_length_and_seed_have_independent_noise() -> None:
    probs = torch.full((VOCAB,), 1 / VOCAB)
    processors = Processors(Controls(temperature=1.0), 4, torch.device("cpu"))

    def tokens(prompt: list[int]) -> list[int]:
        sampler = Sampler(processors, 0, prompt)
        return [sampler.coupled(probs, position) for position in range(4, 2004)]

    one, other = tokens([5, 6, 7, 8]), tokens([5, 6, 7, 9])
    assert one == tokens([5, 6, 7, 8])
    equal = sum(a == b for a, b in zip(one, other, strict=True))
    assert equal < 70  # 31 of 2000 are expected of independent draws
    draws = [Sampler(processors, 0, [5, token]).draw(probs, 1) for token in range(20)]
    assert len({draw[0] for draw in draws}) > 5


def test_the_result_holds_the_seed() -> None:
    decoder = adaptspec.load(tiny_module("llama"), db=MemoryStore())
    asked: dict[str, Any] = {"strategy": "prompt_lookup", "max_new_tokens": LENGTH}
    one, other = (decoder.generate(PROMPT, temperature=1.0, **asked) for _ in range(2))
    assert one.token_ids != other.token_ids
    again = decoder.stream(PROMPT, temperature=1.0, seed=one.seed, **asked)
    again.finish()
    assert again.result.token_ids == one.token_ids
    assert again.result.seed == one.seed
    assert decoder.generate(PROMPT, temperature=0, **asked).seed is None


@pytest.mark.slow
def test_the_command_prints_the_seed_it_drew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from adaptspec.cli import main

    tiny_module("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    asked = ["generate", "-m", str(tmp_path), "--db", str(tmp_path / "p.db"), "--raw"]
    asked += ["-s", "autoregressive", "-n", "20", "-t", "1", "w5 w6 w7"]

    def printed(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*asked, *more])
        assert not ended.value.code
        seen = capsys.readouterr()
        return seen.out if "--json" in more else seen.err

    one, other = (json.loads(printed("--json")) for _ in range(2))
    assert one["token_ids"] != other["token_ids"]
    again = json.loads(printed("--json", "--seed", str(one["seed"])))
    assert again["token_ids"] == one["token_ids"]
    assert f"seed {one['seed']}" in printed("--seed", str(one["seed"]))
