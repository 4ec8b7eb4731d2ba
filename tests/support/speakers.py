"""Tiny models that speak JSON's letters, and transformers' generate under a grammar."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import torch

from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import noisy_draft, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, OTHER_END = 0, 1
TOKENS = 384
VOCAB = 400  # rows of the LM head, more than there are tokens
POSITIONS = 512

SPOKEN = """
{"name": "Ada", "age": 36, "tags": ["a", "b"], "status": "active", "ok": true}
{"name": "Grace", "age": 45, "tags": [], "status": "deleted", "ok": false}
{
  "name": "Alan",
  "age": 41,
  "tags": ["code"],
  "status": "suspended",
  "ok": null
}
yes no yesterday 2026-11-29 12:30 the answer is 42, namely: active or suspended
"""


@functools.cache
def json_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with JSON's usual tokens; ids 0 and 1 end a sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        SPOKEN.splitlines(keepends=True) * 3,
        trainers.BpeTrainer(
            vocab_size=TOKENS,
            special_tokens=["<end>", "<other_end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, eos_token="<end>"
    )


@functools.cache
def speaker(seed: int = 0) -> LanguageModel:
    """A random model with that tokenizer."""
    return tiny_model(
        "llama",
        seed,
        tokenizer=json_tokenizer(),
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
    )


@functools.cache
def speakers_draft(seed: int = 0) -> LanguageModel:
    """A draft model that is often right."""
    return noisy_draft(speaker(seed), noise=0.05)


class Theirs:
    """A logits processor on llguidance, as its own documentation shows one.

    It keeps state: one is made for each call of ``generate``.
    """

    def __init__(
        self, model: LanguageModel, grammar: str, ends: Sequence[int] = (END,)
    ) -> None:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        size = model.vocab_size
        tokens = from_tokenizer(model.tokenizer, n_vocab=size, eos_token=list(ends))
        self._matcher = LLMatcher(tokens, grammar, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()
        self._asked = False

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Consume the newest token, and mask."""
        from llguidance.numpy import (
            allocate_token_bitmask,
            apply_token_bitmask_inplace,
            fill_next_token_bitmask,
        )

        if self._asked and not self._matcher.is_stopped():
            assert self._matcher.consume_token(int(ids[0, -1]))
        self._asked = True
        mask = allocate_token_bitmask(1, scores.shape[-1])
        fill_next_token_bitmask(self._matcher, mask)
        masked = scores.numpy().copy()
        apply_token_bitmask_inplace(masked, mask)
        return torch.from_numpy(masked)


class Partial:
    """A logits processor on the regex package: what a pattern's matches begin with.

    It shares nothing with llguidance, and is for patterns of ASCII.
    """

    def __init__(self, model: LanguageModel, pattern: str, prompt: int) -> None:
        self._pattern, self._prompt = regex.compile(pattern), prompt
        self._model = model
        self._texts = [model.decode([token], False) for token in range(TOKENS)]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask."""
        text = self._model.decode(ids[0, self._prompt :].tolist(), False)
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        for token, more in enumerate(self._texts):
            if token > OTHER_END and more and more.isascii():
                match = self._pattern.fullmatch(text + more, partial=True)
                allowed[token] = match is not None
        allowed[END] = self._pattern.fullmatch(text) is not None
        return scores.masked_fill(~allowed, -torch.inf)


def generates(
    model: LanguageModel,
    ids: Sequence[int],
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    new_tokens: int,
    ends: Sequence[int] = (END,),
    **controls: Any,
) -> list[int]:
    """What the model's own ``generate`` emits greedily under a logits processor."""
    output = model.source.generate(  # type: ignore[operator]
        torch.tensor([list(ids)]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=END,
        logits_processor=[processor],
        **controls,
    )
    return [int(token) for token in output[0, len(ids) :]]


def bits(mask: bytes) -> list[int]:
    """The ids in a mask of llguidance."""
    unpacked = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return [int(token) for token in np.nonzero(unpacked)[0]]
