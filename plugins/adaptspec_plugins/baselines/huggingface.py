"""Hugging Face's own ``generate``: the baselines that our decoding is measured against.

Plain, assisted and prompt lookup, on the caller's unchanged model, greedily, under the
model's own generation defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from adaptspec.decoding.generation_fields import ONE_SEQUENCE
from adaptspec.params import Params, Tunable
from adaptspec.strategy import Baseline, BaselineRun, Requirements

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel


class HFGenerate(Baseline):
    """What a user of transformers has without further ado."""

    name = "hf_generate"
    summary = "transformers' model.generate, greedy"
    reference = "https://huggingface.co/docs/transformers/main_classes/text_generation"

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """The unchanged modules must still be there."""
        if reason := super().unavailable(model, draft):
            return reason
        if reason := _unusable(model):
            return reason
        if cls.requires.draft is None or draft is None:
            return None
        return _unusable(draft)

    def run(
        self,
        model: LanguageModel,
        draft: LanguageModel | None,
        ids: Sequence[int],
        max_new_tokens: int,
    ) -> BaselineRun:
        """Decode greedily; state kept between runs is reset."""
        return _generate(model, ids, max_new_tokens, {})


class HFAssistedParams(Params):
    """Defaults are transformers'."""

    num_assistant_tokens: Annotated[int, Tunable(1, 20)] = Field(
        default=20,
        ge=1,
        le=128,
        description="tokens the assistant drafts per step, at first",
    )
    schedule: Literal["constant", "heuristic", "heuristic_transient"] = Field(
        default="constant", description="how that number follows the acceptance"
    )
    confidence_threshold: Annotated[float, Tunable(0.0, 0.9, step=0.1)] = Field(
        default=0.4,
        ge=0.0,
        lt=1.0,
        description="stop after a token the assistant gives less probability than this",
    )


class HFAssisted(HFGenerate):
    """Speculative decoding as transformers has it."""

    name = "hf_assisted"
    summary = "transformers' assisted generation with the draft model, greedy"
    reference = "https://huggingface.co/blog/assisted-generation"
    Params = HFAssistedParams
    requires = Requirements(draft="same vocabulary")
    params: HFAssistedParams

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """transformers takes other sizes of the vocabulary for another tokenizer."""
        if reason := super().unavailable(model, draft):
            return reason
        assert draft is not None
        sizes = model.config.vocab_size, draft.config.vocab_size
        if sizes[0] != sizes[1]:
            return f"transformers wants vocabularies of one size, got {sizes}"
        return None

    def run(
        self,
        model: LanguageModel,
        draft: LanguageModel | None,
        ids: Sequence[int],
        max_new_tokens: int,
    ) -> BaselineRun:
        """Decode greedily; state kept between runs is reset."""
        assert draft is not None
        assistant: Any = draft.source
        with _settings(assistant, self.params):
            return _generate(model, ids, max_new_tokens, {"assistant_model": assistant})


class HFPromptLookupParams(Params):
    """transformers has no default number of tokens; 10 is its documentation's."""

    prompt_lookup_num_tokens: Annotated[int, Tunable(2, 20)] = Field(
        default=10, ge=1, le=128, description="tokens copied per step"
    )
    max_matching_ngram_size: Annotated[int, Tunable(1, 5)] = Field(
        default=2, ge=1, le=32, description="longest n-gram looked up, in tokens"
    )


class HFPromptLookup(HFGenerate):
    """Prompt lookup as transformers has it."""

    name = "hf_prompt_lookup"
    summary = "transformers' prompt lookup, greedy"
    reference = "https://github.com/apoorvumang/prompt-lookup-decoding"
    Params = HFPromptLookupParams
    params: HFPromptLookupParams

    def run(
        self,
        model: LanguageModel,
        draft: LanguageModel | None,
        ids: Sequence[int],
        max_new_tokens: int,
    ) -> BaselineRun:
        """Decode greedily; state kept between runs is reset."""
        return _generate(model, ids, max_new_tokens, {}, **self.params.model_dump())


class _Arrivals(BaseStreamer):
    """When tokens came: one call for the prompt, then one for each target forward."""

    def __init__(self) -> None:
        self.calls = 0
        self.first_at = 0.0
        self.first_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first_at, self.first_tokens = perf_counter(), value.numel()

    def end(self) -> None:
        pass


def _generate(
    model: LanguageModel,
    ids: Sequence[int],
    max_new_tokens: int,
    arguments: dict[str, Any],
    **settings: Any,
) -> BaselineRun:
    source: Any = model.source
    input_ids = torch.tensor([list(ids)], device=model.device)
    arrivals = _Arrivals()
    started = perf_counter()
    output = source.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=_greedy(model, max_new_tokens, settings),
        streamer=arrivals,
        **arguments,
    )
    # Reading the tokens waits for the device.
    tokens = output[0, len(ids) :].tolist()
    return BaselineRun(
        token_ids=tokens,
        seconds=perf_counter() - started,
        target_forwards=arrivals.calls - 2,
        seconds_prefill=arrivals.first_at - started,
        first_tokens=arrivals.first_tokens,
    )


def _greedy(model: LanguageModel, max_new_tokens: int, settings: dict[str, Any]) -> Any:
    """A copy of the model's generation defaults for greedy decoding of one sequence."""
    stored = model.generation_config or GenerationConfig.from_dict({})
    config: Any = copy.deepcopy(stored)  # transformers leaves update() untyped
    config.update(
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        min_p=None,
        max_new_tokens=max_new_tokens,
        max_length=None,
        **ONE_SEQUENCE,
        **settings,
    )
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return config


@contextmanager
def _settings(assistant: Any, params: HFAssistedParams) -> Iterator[None]:
    """Give ``generate`` a configuration it may adapt and write to, then drop it.

    It keeps the number of drafted tokens in the assistant's ``generation_config``.
    """
    own = assistant.generation_config
    assistant.generation_config = copy.deepcopy(own)
    assistant.generation_config.update(
        num_assistant_tokens=params.num_assistant_tokens,
        num_assistant_tokens_schedule=params.schedule,
        assistant_confidence_threshold=params.confidence_threshold,
    )
    try:
        yield
    finally:
        assistant.generation_config = own


def _unusable(model: LanguageModel) -> str | None:
    if not getattr(model.source, "can_generate", lambda: False)():
        return f"{model.name} has no generate"
    for module in model.source.modules():
        if isinstance(module, nn.Linear):
            weight = getattr(module, "weight", None)
            shape = (module.out_features, module.in_features)
            if weight is None or weight.is_meta or tuple(weight.shape) != shape:
                return (
                    f"the weights of {model.name} were repacked; "
                    "load it with accelerate=False"
                )
    return None
