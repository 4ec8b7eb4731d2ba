"""Drafts whose vocabulary differs in added tokens only draft; others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaptspec_plugins
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import (
    VOCAB,
    hf_greedy,
    random_ids,
    tiny_module,
    tiny_tokenizer,
)

MARKS = ["<tool>", "<think>", "</think>"]


def model(name: str, extra: int = 0, rows: int | None = None, seed: int = 0) -> Any:
    """With so many added tokens, and as many rows or as asked for."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_tokens(MARKS[:extra], special_tokens=True)
    module = tiny_module("llama", seed, vocab_size=rows or len(tokenizer))
    return LanguageModel(module, tokenizer, name)


def test_added_tokens_and_padding_may_differ() -> None:
    target = model("target", 3)
    for draft in (
        model("fewer", 0),
        model("some", 1),
        model("padded", 3, 80),
        model("cut", 3, VOCAB),
    ):
        assert target.vocabulary_mismatch(draft) is None
        assert draft.vocabulary_mismatch(target) is None
    plainly_added: Any = tiny_tokenizer()
    plainly_added.add_tokens(MARKS)
    module = tiny_module("llama", vocab_size=VOCAB + 3)
    assert LanguageModel(module, plainly_added).vocabulary_mismatch(target) is None


def test_tokens_of_text_that_differ_are_counted_and_one_is_named() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {w: i for w, i in tiny_tokenizer().get_vocab().items()}
    words["w5"], words["w6"] = 6, 5
    words["other"] = words.pop("w7")
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>"
    )
    other = LanguageModel(tiny_module("llama"), tokenizer, "other")
    said = model("mine").vocabulary_mismatch(other)
    assert said is not None
    assert "mine and other disagree on 4 of 63 text tokens: 'w5' " in said
    assert "is token 5 in the first and token 6 in the second" in said


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", ["draft_model", "draft_tree", "hybrid"])
@pytest.mark.parametrize("draft", [model("fewer", 0), model("padded", 3, 90)])
def test_a_draft_that_lacks_tokens_drafts_without_changing_the_output(
    strategy: str, draft: LanguageModel, temperature: float
) -> None:
    target = model("target", 3, seed=2)
    host = Host({"bundled": adaptspec_plugins})
    marks = [VOCAB, VOCAB + 2]
    ids = [marks[0], *random_ids(6), marks[1], *random_ids(4, seed=1)]
    # Its own text has tokens that the draft doesn't know, too.
    controls = Controls(
        24,
        temperature=temperature,
        seed=3,
        logits_processor=[_favour(marks)],
    )
    assert host.strategy(strategy).unavailable(target, draft) is None
    engine = Engine(target, draft)
    plain = engine.generate(host.create("autoregressive", {}), ids, controls)
    params: dict[str, Any] = {}
    if temperature and strategy == "draft_model":
        params = {"draft_sampling": "coupled"}
    found = engine.generate(host.create(strategy, params), ids, controls)
    assert set(marks) & set(plain.token_ids)
    assert found.token_ids == plain.token_ids
    if not temperature:
        bare = Controls.greedy(24)
        created = host.create(strategy, {})
        assert engine.generate(created, ids, bare).token_ids == hf_greedy(
            target, ids, 24
        )


def test_controls_that_leave_no_token_of_the_draft_are_no_error() -> None:
    target, draft = model("target", 3), model("fewer", 0)
    host = Host({"bundled": adaptspec_plugins})
    for temperature in (0.0, 1.0):
        for sampling in ("independent", "coupled"):
            controls = Controls(
                6, temperature=temperature, seed=1, logits_processor=[_only([VOCAB])]
            )
            strategy = host.create("draft_model", {"draft_sampling": sampling})
            found = Engine(target, draft).generate(strategy, random_ids(5), controls)
            assert found.token_ids == [VOCAB] * 6


def test_a_draft_of_equal_text_is_left_to_draft_model() -> None:
    host = Host({"bundled": adaptspec_plugins})
    universal = host.strategy("universal_draft")
    said = universal.unavailable(model("target", 3), model("fewer", 0))
    assert said is not None
    assert "use draft_model" in said


def test_transformers_assisted_generation_is_refused_for_other_sizes() -> None:
    host = Host({"bundled": adaptspec_plugins})
    target, draft = (
        LanguageModel(m.source, m.tokenizer, m.name, accelerate=False)
        for m in (model("target", 3), model("fewer", 0))
    )
    said = host.baselines["hf_assisted"].unavailable(target, draft)
    assert said == "transformers wants vocabularies of one size, got (67, 64)"


def _favour(tokens: list[int]) -> Any:
    def favour(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        if ids.shape[1] % 5 == 0:
            scores[:, tokens] += 40
        return scores

    return favour


def _only(tokens: list[int]) -> Any:
    def only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, tokens] = scores[:, tokens]
        return kept

    return only
