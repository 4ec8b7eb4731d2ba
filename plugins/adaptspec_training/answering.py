"""The model answers prompts itself, many at once, and its hidden states are kept.

Self-distillation as in Medusa (arXiv:2401.10774, section 2.3): heads learn what this
very model says. A head reads the hidden state from which a token was chosen; decoding
computes it anyway, so no second pass over the answers is needed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from adaptspec.model.language_model import LanguageModel
from adaptspec_training.conversations import Example

# A batch is made smaller once only this share of it is still being answered.
CROWDED = 0.7


class Answers:
    """Answers batches of prompts.

    Args:
        model: Answers.
        temperature: 0 takes the likeliest token.
        seed: With a prompt's id it decides the prompt's draws, whatever is beside it.
        eos_token_ids: Any of them ends an answer, itself included.
        hidden: Whether hidden states are wanted.
    """

    def __init__(
        self,
        model: LanguageModel,
        temperature: float,
        seed: int,
        eos_token_ids: Sequence[int],
        hidden: bool = True,
    ) -> None:
        self._model = model
        self._temperature, self._seed = temperature, seed
        self._ends = frozenset(eos_token_ids)
        self._layers = (-1,) if hidden else ()

    @property
    def most_at_once(self) -> int | None:
        """1 for models whose state can't be padded, else no limit."""
        return 1 if self._model.capability.level == "plain" else None

    @torch.inference_mode()
    def answer(
        self,
        ids: Sequence[str],
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
    ) -> tuple[list[Example], list[torch.Tensor]]:
        """Examples and their features ``[answer tokens, hidden]``, in order.

        Args:
            ids: Of the prompts; unique.
            prompts: Token ids.
            limits: Most tokens of each answer.
        """
        model = self._model
        count, longest = len(prompts), max(map(len, prompts))
        draws = [random.Random(f"{self._seed}:{i}") for i in ids]
        answers: list[list[int]] = [[] for _ in prompts]
        states: list[list[torch.Tensor]] = [[] for _ in prompts]
        tokens = torch.zeros((count, longest), dtype=torch.long)
        mask = torch.zeros((count, longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, longest - len(prompt) :] = 1
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        cache: Any
        if model.capability.level == "plain":
            cache = model.plain_cache().inner
        else:
            cache = model.new_cache(longest + max(limits))
        rows = list(range(count))  # which prompt each row of the batch is
        while True:
            logits, hidden = model.extend_batch(
                tokens, mask, cache, hidden_layers=self._layers
            )
            chosen = self._choose(logits, [draws[row] for row in rows])
            kept = []
            for at, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                if len(answers[row]) >= limits[row] or (
                    answers[row] and answers[row][-1] in self._ends
                ):
                    continue
                answers[row].append(token)
                for layer in self._layers:
                    states[row].append(hidden[layer][at])
                if token not in self._ends and len(answers[row]) < limits[row]:
                    kept.append(at)
            if not kept:
                break
            if len(kept) <= CROWDED * len(rows) and len(rows) > 1:
                index = torch.tensor(kept, device=model.device)
                _narrow(cache, index)
                mask = mask[index]
                rows = [rows[at] for at in kept]
                chosen = [chosen[at] for at in kept]
            tokens = torch.tensor(chosen, device=model.device)[:, None]
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], 1)
        examples = [
            Example(i, (*prompt, *answer), ((len(prompt), len(prompt) + len(answer)),))
            for i, prompt, answer in zip(ids, prompts, answers, strict=True)
        ]
        features = [torch.stack(state) for state in states] if self._layers else []
        return examples, features

    def _choose(
        self, logits: torch.Tensor, draws: Sequence[random.Random]
    ) -> list[int]:
        if self._temperature <= 0:
            return [int(token) for token in logits.argmax(-1).tolist()]
        cumulative = (logits.float() / self._temperature).softmax(-1).cumsum(-1)
        uniform = torch.tensor([[draw.random()] for draw in draws]).to(cumulative)
        # Rounding may leave the sum short of one: the draw is taken as a share of it.
        found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
        return [int(t) for t in found[:, 0].clamp_max(logits.shape[-1] - 1).tolist()]


def _narrow(cache: Any, rows: torch.Tensor) -> None:
    """Keep these sequences of the cache."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)
