"""Tiny random models whose attention matters, and drafts that agree with them often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context
from adaptspec.token_tree import TokenTree
from adaptspec_plugins.draft.sequence import DraftSequence

BuildModel = Callable[..., LanguageModel]


def _llama(seed: int, vocab_size: int, layers: int, positions: int) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


@pytest.fixture(scope="session")
def llama() -> BuildModel:
    """``llama(noise=0.0, ...)``: the same weights each time, noise added.

    A model with a little noise is a good draft for the one without.
    """

    def build(
        vocab_size: int = 64,
        noise: float = 0.0,
        seed: int = 0,
        layers: int = 2,
        positions: int = 512,
    ) -> LanguageModel:
        model = _llama(seed, vocab_size, layers, positions)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = noise * parameter.std(correction=0)
                noise_drawn = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise_drawn)
        return LanguageModel(model)

    return build


@pytest.fixture(scope="session")
def gpt2() -> BuildModel:
    """A model with learned positions, which fails beyond ``positions``."""

    def build(vocab_size: int = 64, positions: int = 24) -> LanguageModel:
        torch.manual_seed(3)
        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=positions,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LanguageModel(GPT2LMHeadModel(config))

    return build


@pytest.fixture(scope="session")
def target(llama: BuildModel) -> LanguageModel:
    """The model that is decoded."""
    return llama()


@pytest.fixture(scope="session")
def draft(llama: BuildModel) -> LanguageModel:
    """Right often, wrong often."""
    return llama(noise=0.02)


@pytest.fixture(scope="session")
def fresh_logits() -> Callable[..., torch.Tensor]:
    """Logits after ``ids`` from the caller's module, without a cache."""

    @torch.inference_mode()
    def forward(model: LanguageModel, ids: list[int]) -> torch.Tensor:
        source: Any = model.source
        logits: torch.Tensor = source(torch.tensor([ids]), use_cache=False).logits[
            0, -1
        ]
        return logits

    return forward


@pytest.fixture
def prompt() -> list[int]:
    """Some tokens below 64."""
    generator = torch.Generator().manual_seed(7)
    return [int(t) for t in torch.randint(0, 64, (13,), generator=generator)]


@dataclass
class CheckedDrafts:
    """What was seen of a draft: logits compared, committed tokens fed at each step."""

    compared: int = 0
    fed: list[int] = field(default_factory=list)


@pytest.fixture
def checked_drafts(
    monkeypatch: pytest.MonkeyPatch, fresh_logits: Callable[..., torch.Tensor]
) -> CheckedDrafts:
    """From here on every draft evaluation is compared with a fresh forward pass."""
    seen = CheckedDrafts()
    begin, extend = DraftSequence.begin, DraftSequence.extend
    prefill = LanguageModel.prefill
    committed: list[int] = []

    def compare(sequence: DraftSequence, node: int, row: torch.Tensor) -> None:
        tree = TokenTree(sequence._tokens, sequence._parents)
        expected = fresh_logits(sequence._model, committed + tree.path_tokens(node))
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
        seen.compared += 1

    def checked_begin(self: DraftSequence, context: Context) -> torch.Tensor:
        committed[:] = context.ids

        def counting(model: LanguageModel, tokens: Any, *rest: Any) -> Any:
            seen.fed.append(len(tokens))
            return prefill(model, tokens, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "prefill", counting)
            logits = begin(self, context)
        compare(self, 0, logits[0])
        return logits

    def checked_extend(
        self: DraftSequence, tokens: Sequence[int], parents: Sequence[int]
    ) -> torch.Tensor:
        first = len(self._tokens)
        logits = extend(self, tokens, parents)
        for i, row in enumerate(logits):
            compare(self, first + i, row)
        return logits

    monkeypatch.setattr(DraftSequence, "begin", checked_begin)
    monkeypatch.setattr(DraftSequence, "extend", checked_extend)
    return seen
