"""A smaller language model drafts a chain of tokens.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318). The coupled law lets the draft use the target's own noise (Daliri et
al. 2024, arXiv:2408.07978), so that sampling emits what plain sampling would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from adaptspec.params import Params, Tunable
from adaptspec.strategy import Context, Drafter, Law, Strategy, Target, TokenTree
from adaptspec_plugins._draft_sequence import DraftSequence


class DraftModelParams(Params):
    """``draft_law`` and ``draft_temperature`` matter only under sampling."""

    k: Annotated[int, Tunable(1, 12)] = Field(
        default=4, ge=1, le=64, description="most tokens drafted per step"
    )
    stop: Annotated[float, Tunable(0.0, 0.9, step=0.1)] = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="stop after a token the draft gives less probability than this",
    )
    draft_law: Literal["independent", "coupled"] = Field(
        default="independent",
        description=(
            "under sampling: accept more, or emit plain sampling's tokens exactly"
        ),
    )
    draft_temperature: float = Field(
        default=1.0,
        gt=0.0,
        le=10.0,
        description="under sampling: factor on the temperature of the draft's law",
    )


class DraftModel(Strategy):
    """One draft forward per drafted token; pays where the draft is fast and agrees."""

    name = "draft_model"
    summary = "a smaller model of the same vocabulary drafts a chain"
    reference = "arXiv:2211.17192"
    Params = DraftModelParams
    needs_draft = True
    params: DraftModelParams

    def start(self, target: Target) -> Drafter:
        """The draft model reads the prompt at the first step."""
        return _ChainDrafter(self.params, target)


class _ChainDrafter(Drafter):
    def __init__(self, params: DraftModelParams, target: Target) -> None:
        assert target.draft is not None
        self._params = params
        self._sampling = target.sampling
        self._sampled = not target.sampling.greedy and params.draft_law == "independent"
        self._sequence = DraftSequence(target.draft, target.model.vocab_size)

    def propose(self, context: Context) -> TokenTree:
        count = min(self._params.k, self._sequence.room(context))
        root = context.ids[-1]
        if count < 1:
            return TokenTree.root_only(root)
        logits = self._sequence.begin(context)[0]
        ids = list(context.ids)
        laws: list[torch.Tensor] = []
        while True:
            token, confidence = self._next(ids, logits, laws)
            ids.append(token)
            drafted = len(ids) - len(context.ids)
            # Stopping after the doubtful token, never before it: whether a token is
            # drafted must not depend on which token it is.
            if drafted == count or confidence < self._params.stop:
                break
            logits = self._sequence.extend([token], [drafted - 1])[0]
        law = Law.INDEPENDENT if self._sampled else Law.DETERMINISTIC
        return TokenTree.chain(root, ids[len(context.ids) :], law, laws)

    def _next(
        self, ids: Sequence[int], logits: torch.Tensor, laws: list[torch.Tensor]
    ) -> tuple[int, float]:
        """The next draft token and the draft's probability of it (1 if nobody asks)."""
        if self._sampling.greedy:
            # The law, not the logits: processors (repetition penalty) move the argmax.
            token = int(self._sampling.probs(ids, logits).argmax())
            if self._params.stop == 0:
                return token, 1.0
            return token, float(logits.float().softmax(-1)[token])
        probs = self._sampling.probs(ids, logits / self._params.draft_temperature)
        if self._sampled:
            laws.append(probs)
            [token] = self._sampling.draw(probs)
        else:
            token = self._sampling.coupled(probs, len(ids))
        return token, float(probs[token]) if self._params.stop > 0 else 1.0
