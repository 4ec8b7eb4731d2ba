"""Sampled output of the drop-in, with every bundled strategy: that of ``generate``.

Where drafts are drawn at random it is another sample; :class:`StrategyContract` looks
at their distribution.
"""

from __future__ import annotations

import copy
import functools
import string
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import adaptspec_plugins
from adaptspec.decoder import Decoder
from adaptspec.drop_in.speed_up import SpeedUp
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import noisy_draft, random_ids, tiny_module
from adaptspec.testing.heads import attach_tiny_heads
from adaptspec_profiles.memory import MemoryStore

HOST = Host({"bundled": adaptspec_plugins})
FAMILIES = ("llama", "gpt2")
LETTERS = string.ascii_letters + string.digits + "_-"
PAD = 0
LENGTHS = (12, 5)
BATCH = torch.tensor([[PAD] * (12 - n) + random_ids(n, seed=n) for n in LENGTHS])
MASK = torch.tensor([[0] * (12 - n) + [1] * n for n in LENGTHS])
SAMPLED = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "top_k": 12}

SAME: tuple[tuple[str, dict[str, Any]], ...] = (
    ("autoregressive", {}),
    ("draft_model", {"draft_sampling": "coupled"}),
    ("draft_model", {"draft_sampling": "coupled", "draft_length": 7, "stop": 0.3}),
    ("draft_tree", {}),
    ("hybrid", {}),
    ("hybrid", {"use_draft": False}),
    ("lookahead", {}),
    ("medusa", {}),
    ("medusa", {"tree": "dynamic"}),
    # Its lossy rule gives way to the exact one in the drop-in.
    ("medusa_typical", {}),
    ("prompt_lookup", {"branches": 2}),
    ("suffix", {}),
    ("suffix", {"tree": False}),
    ("token_recycling", {}),
    ("universal_draft", {"mode": "text"}),
)
OTHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("draft_model", {}),
    ("draft_tree", {"mode": "sampled"}),
    ("universal_draft", {"mode": "intersection"}),
)


def characters(alphabet: str) -> PreTrainedTokenizerFast:
    """One token for each character, in order."""
    vocab = {character: number for number, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab, []))
    return PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]


@functools.cache
def pair(family: str, foreign: bool) -> tuple[LanguageModel, LanguageModel]:
    """A target with heads, and a draft that is often right.

    Args:
        foreign: The draft's tokenizer has the same characters in another order.
    """
    module = tiny_module(family, tie_word_embeddings=False)
    module.generation_config.pad_token_id = PAD
    target = LanguageModel(module, characters(LETTERS), family)
    attach_tiny_heads(target, "fitted", texts=[random_ids(40, seed) for seed in (1, 2)])
    draft = noisy_draft(target)
    if foreign:
        source: Any = copy.deepcopy(draft.source)
        for part in (source.get_input_embeddings(), source.get_output_embeddings()):
            part.weight.data = part.weight.data.flip(0)
        draft = LanguageModel(source, characters(LETTERS[::-1]), f"{family}-foreign")
    return target, draft


@functools.cache
def fast(family: str, foreign: bool) -> SpeedUp:
    decoder = Decoder(*pair(family, foreign), MemoryStore(), HOST)
    return SpeedUp(pair(family, foreign)[0].source, decoder)


def sampled(generate: Any, seed: int, **given: Any) -> tuple[torch.Tensor, Any]:
    """Its output, and how torch's generator is left."""
    torch.manual_seed(seed)
    return generate(**given), torch.get_rng_state()


def inputs(rows: int) -> dict[str, Any]:
    if rows == 1:
        return {"inputs": BATCH[:1]}
    return {"inputs": BATCH, "attention_mask": MASK}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("strategy", "params"), SAME)
def test_a_seed_gives_generates_sample(
    family: str, strategy: str, params: dict[str, Any]
) -> None:
    speedup = fast(family, strategy == "universal_draft")
    accepted = 0
    for rows, seed in ((1, 1), (1, 2), (2, 3)):
        given = {**inputs(rows), **SAMPLED}
        expected, after = sampled(speedup.model.generate, seed, **given)
        found, left = sampled(speedup, seed, strategy=strategy, params=params, **given)
        assert torch.equal(found, expected)
        assert torch.equal(left, after)
        for row in speedup.decoder.last:
            assert row.choice.strategy == strategy
            accepted += sum(step.accepted for step in row.stats.steps)
    if strategy not in ("autoregressive", "lookahead"):
        assert accepted


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "params"), OTHER)
def test_drafts_drawn_at_random_give_another_sample_that_the_seed_repeats(
    strategy: str, params: dict[str, Any]
) -> None:
    speedup = fast("llama", strategy == "universal_draft")
    given = {**inputs(1), **SAMPLED}
    own, _ = sampled(speedup.model.generate, 1, **given)
    first, _ = sampled(speedup, 1, strategy=strategy, params=params, **given)
    again, _ = sampled(speedup, 1, strategy=strategy, params=params, **given)
    assert torch.equal(first, again)
    assert not torch.equal(first, own)


def test_no_bundled_strategy_is_left_out() -> None:
    assert {name for name, _ in (*SAME, *OTHER)} == set(HOST.strategies)
