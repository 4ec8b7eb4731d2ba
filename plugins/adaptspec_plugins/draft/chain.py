"""A smaller language model drafts a chain of tokens.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318). Coupled sampling lets the draft use the target's own noise (Daliri et
al. 2024, arXiv:2408.07978), so that sampling emits what plain sampling would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from adaptspec.params import DraftingParams, Scalar, Tunable
from adaptspec.strategy import (
    Context,
    Drafter,
    Requirements,
    Strategy,
    Target,
    TokenTree,
)
from adaptspec_plugins.draft.drawing import DraftChain, DraftSampling
from adaptspec_plugins.draft.sequence import DraftSequence

if TYPE_CHECKING:
    import torch


class DraftModelParams(DraftingParams):
    """``draft_sampling`` and ``draft_temperature`` matter only under sampling."""

    draft_length: Annotated[int, Tunable(1, 12)] = Field(default=4, ge=1, le=64)
    stop: Annotated[float, Tunable(0.0, 0.9, step=0.1)] = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="stop after a token the draft gives less probability than this",
    )
    draft_sampling: DraftSampling = Field(
        default="independent",
        description=(
            "under sampling: accept more, or emit plain sampling's tokens exactly"
        ),
    )
    draft_temperature: float = Field(
        default=1.0,
        gt=0.0,
        le=10.0,
        description="under sampling: factor on the draft's temperature",
    )


class DraftModel(Strategy):
    """One draft forward per drafted token; pays where the draft is fast and agrees."""

    name = "draft_model"
    summary = "a smaller model of the same vocabulary drafts a chain"
    reference = "arXiv:2211.17192"
    Params = DraftModelParams
    replays = True
    requires = Requirements(draft="same vocabulary")
    # Coupled, so that it proposes deterministically under sampling too. Past a token
    # the draft doubts, another forward of it seldom pays.
    joins: ClassVar[Mapping[str, Scalar]] = {
        "draft_length": 6,
        "stop": 0.3,
        "draft_sampling": "coupled",
    }
    params: DraftModelParams

    def start(self, target: Target) -> Drafter:
        """The draft model reads the prompt at the first step."""
        return _ChainDrafter(self.params, target)


class _ChainDrafter(Drafter):
    def __init__(self, params: DraftModelParams, target: Target) -> None:
        assert target.draft is not None
        self._draft_length = params.draft_length
        self._chain = DraftChain(
            target.sampling,
            params.draft_sampling,
            params.stop,
            params.draft_temperature,
        )
        self._sequence = DraftSequence(target.draft, target.model.vocab_size)

    def propose(self, context: Context) -> TokenTree:
        def after(drafted: Sequence[int]) -> torch.Tensor:
            if not drafted:
                return self._sequence.begin(context)[0]
            return self._sequence.extend(drafted[-1:], [len(drafted) - 1])[0]

        count = min(self._draft_length, self._sequence.room(context))
        return self._chain.draft(context.ids, count, after, context.least)
