"""The Hugging Face baselines: the same tokens as ours, and no memory between runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Baseline
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.baselines.huggingface import (
    HFAssisted,
    HFAssistedParams,
    HFGenerate,
    HFPromptLookup,
)

BuildModel = Callable[..., LanguageModel]
NEW_TOKENS = 24


def adapting() -> HFAssisted:
    return HFAssisted(
        HFAssistedParams(
            num_assistant_tokens=3, schedule="heuristic", confidence_threshold=0.0
        )
    )


@pytest.fixture
def counted_forwards(
    target: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Tokens read by each forward of the target's own module."""
    widths: list[int] = []
    source: Any = target.source
    forward = source.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    functools.update_wrapper(counting, forward)
    monkeypatch.setattr(source, "forward", counting)
    return widths


@pytest.mark.parametrize("baseline", [HFGenerate(), HFAssisted(), HFPromptLookup()])
def test_a_baseline_emits_the_tokens_of_plain_decoding_and_times_its_parts(
    target: LanguageModel, draft: LanguageModel, prompt: list[int], baseline: Baseline
) -> None:
    assert type(baseline).unavailable(target, draft) is None
    run = baseline.run(target, draft, prompt, NEW_TOKENS)
    plain = Engine(target).generate(
        Autoregressive(), prompt, Controls.greedy(NEW_TOKENS)
    )
    assert run.token_ids == plain.token_ids
    assert run.seconds_prefill is not None
    assert 0 < run.seconds_prefill < run.seconds
    decoded = NEW_TOKENS - run.first_tokens
    seconds = run.seconds - run.seconds_prefill
    assert run.tokens_per_second == pytest.approx(decoded / seconds)


@pytest.mark.parametrize("baseline", [HFGenerate(), adapting(), HFPromptLookup()])
def test_forwards_are_those_of_the_targets_module_without_the_first(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    counted_forwards: list[int],
    baseline: Baseline,
) -> None:
    run = baseline.run(target, draft, prompt, NEW_TOKENS)
    assert run.target_forwards == len(counted_forwards) - 1
    assert counted_forwards[0] >= len(prompt)


def test_what_assisted_generation_adapts_is_forgotten_after_the_run(
    target: LanguageModel, draft: LanguageModel, prompt: list[int]
) -> None:
    assistant: Any = draft.source
    before = assistant.generation_config.to_dict()
    runs = [adapting().run(target, draft, prompt, NEW_TOKENS) for _ in range(2)]
    assert assistant.generation_config.to_dict() == before
    assert runs[0].token_ids == runs[1].token_ids
    assert runs[0].target_forwards == runs[1].target_forwards
    assert runs[0].first_tokens == runs[1].first_tokens


def test_without_the_reset_transformers_does_keep_what_it_adapted(
    target: LanguageModel, draft: LanguageModel, prompt: list[int]
) -> None:
    source, assistant = target.source, draft.source
    own: Any = assistant.generation_config
    changed = type(own).from_dict(own.to_dict())
    changed.num_assistant_tokens, changed.num_assistant_tokens_schedule = 3, "heuristic"
    changed.assistant_confidence_threshold = 0.0
    try:
        assistant.generation_config = changed
        ids: Any = torch.tensor([prompt])
        generate: Any = source.generate
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=assistant,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        assert changed.num_assistant_tokens != 3
    finally:
        assistant.generation_config = own


@pytest.mark.parametrize("baseline", [HFGenerate(), HFAssisted(), HFPromptLookup()])
def test_the_models_end_of_sequence_ends_the_run_and_its_sampling_is_switched_off(
    llama: BuildModel, draft: LanguageModel, prompt: list[int], baseline: Baseline
) -> None:
    model = llama()
    plain = Engine(model).generate(Autoregressive(), prompt, Controls.greedy(12))
    eos = plain.token_ids[5]
    config: Any = model.generation_config
    config.update(eos_token_id=[eos], do_sample=True, temperature=5.0, top_k=3)
    config.update(num_beams=3, length_penalty=2.0, penalty_alpha=0.6, max_time=60.0)
    before = config.to_dict()
    run = baseline.run(model, draft, prompt, NEW_TOKENS)
    end = plain.token_ids.index(eos) + 1
    assert run.token_ids == plain.token_ids[:end]
    assert config.to_dict() == before


def test_a_model_without_its_own_weights_is_refused_with_the_way_out(
    llama: BuildModel, target: LanguageModel
) -> None:
    repacked = llama()
    linear = next(m for m in repacked.source.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(torch.empty(0))
    for baseline in (HFGenerate, HFPromptLookup):
        assert "accelerate=False" in (baseline.unavailable(repacked, None) or "")
    assert "accelerate=False" in (HFAssisted.unavailable(target, repacked) or "")
    assert "draft model" in (HFAssisted.unavailable(target, None) or "")
