"""Medusa: heads on the target's last hidden state guess the tokens after the next.

Cai et al. 2024, arXiv:2401.10774. Verified exactly, in greedy decoding and sampling;
the paper's typical acceptance, which changes the output's distribution, is a strategy
apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from adaptspec.decoding.acceptance import Typical
from adaptspec.heads.measured_paths import KIND
from adaptspec.params import DraftingParams, Scalar, Tunable
from adaptspec.strategy import (
    Context,
    Drafter,
    Observes,
    Outcome,
    Requirements,
    Strategy,
    Target,
    TokenTree,
)
from adaptspec_plugins.medusa.trees import (
    Shape,
    assumed,
    best_first,
    calibrated,
    chain,
    unmeasured,
)

if TYPE_CHECKING:
    import torch

    from adaptspec.heads.attached import MedusaTrained
    from adaptspec.model.language_model import LanguageModel

MISSING = (
    "needs Medusa heads trained for this model (--heads DIR; adaptspec train medusa "
    "makes them)"
)


class MedusaParams(DraftingParams):
    """``draft_length`` decides most; ``dynamic`` trees shrink in doubt."""

    heads: Annotated[int, Tunable(1, 5)] = Field(
        default=4, ge=1, le=16, description="heads asked at most, each one token deeper"
    )
    draft_length: Annotated[int, Tunable(4, 64, log=True)] = Field(
        default=16, ge=1, le=256
    )
    tree: Annotated[Literal["calibrated", "dynamic", "chain"], Tunable()] = Field(
        default="calibrated",
        description="ranks measured best, the heads' own probabilities, or first ranks",
    )
    top_k: Annotated[int, Tunable(2, 10)] = Field(
        default=10, ge=1, le=64, description="most guesses of one head"
    )
    min_chance: Annotated[float, Tunable(0.0, 0.2, when={"tree": ("dynamic",)})] = (
        Field(
            default=0.0,
            ge=0.0,
            le=1.0,
            description="dynamic: least probability of a path by the heads",
        )
    )


class Medusa(Strategy):
    """No second model: drafting costs a few small products beside the target's."""

    name = "medusa"
    summary = "trained heads on the target guess several tokens ahead, as a tree"
    reference = "arXiv:2401.10774"
    Params = MedusaParams
    params: MedusaParams
    requires = Requirements(heads=KIND)
    replays = True
    joins: ClassVar[Mapping[str, Scalar] | None] = {
        "tree": "dynamic",
        "draft_length": 24,
    }

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Heads must be attached, and the model must give the states they read."""
        if KIND not in model.heads:
            return MISSING
        if reason := super().unavailable(model, draft):
            return reason
        from adaptspec.heads.attached import hidden_problem

        return hidden_problem(model)

    def observes(self, model: LanguageModel) -> Observes:
        """The last hidden state, of the prompt's last token too."""
        return Observes(hidden_layers=(-1,), prefill_hidden="last")

    def start(self, target: Target) -> Drafter:
        """The heads are read at each step, not here."""
        from adaptspec.heads.attached import MedusaTrained, lm_head_of

        trained = target.model.heads[KIND]
        assert isinstance(trained, MedusaTrained)
        return _Guesser(
            self.params, trained, lm_head_of(target.model), trees=target.trees
        )


class MedusaTypicalParams(MedusaParams):
    """The acceptance rule's own, and those of ``medusa``."""

    posterior_threshold: Annotated[float, Tunable(0.01, 0.3, log=True)] = Field(
        default=0.09,
        gt=0.0,
        lt=1.0,
        description="a token this likely is accepted; higher is stricter",
    )
    posterior_alpha: Annotated[float, Tunable(0.1, 0.6)] = Field(
        default=0.3,
        gt=0.0,
        le=1.0,
        description="where the target is unsure, less will do: alpha * exp(-entropy)",
    )


class MedusaTypical(Medusa):
    """Accepts what is typical of the target, not what it would have sampled.

    Lossy: the output is drawn from another distribution than the target's. Greedy
    decoding isn't touched.
    """

    name = "medusa_typical"
    summary = "medusa with typical acceptance: plausible tokens pass, sampling changes"
    Params = MedusaTypicalParams
    params: MedusaTypicalParams
    lossless = False
    joins = None

    @property
    def acceptance(self) -> Typical | None:
        """The paper's rule."""
        return Typical(self.params.posterior_threshold, self.params.posterior_alpha)


class _Guesser(Drafter):
    def __init__(
        self,
        params: MedusaParams,
        trained: MedusaTrained,
        lm_head: torch.nn.Module,
        *,
        trees: bool,
    ) -> None:
        self._params, self._trained, self._lm_head = params, trained, lm_head
        self._kind = params.tree if trees else "chain"
        self._width = min(params.top_k, trained.width)
        ranks = trained.ranks or unmeasured(trained.count, self._width)
        self._ranks = tuple(tuple(row) for row in ranks)
        self._hidden: torch.Tensor | None = None  # of the last token that is cached

    def observe(self, outcome: Outcome) -> None:
        """Keep the state whose next token is the coming step's root."""
        last = outcome.path[-1] if outcome.tree is not None else -1
        self._hidden = outcome.hidden[-1][last]

    def propose(self, context: Context) -> TokenTree:
        """The heads' guesses in the shape asked for."""
        root = context.ids[-1]
        depth = min(self._params.heads, self._trained.count, context.room - 1)
        nodes = min(self._params.draft_length, context.max_nodes)
        if depth < 1 or nodes < 1 or self._hidden is None:
            return TokenTree.root_only(root)
        if self._kind == "dynamic":
            guesses = self._trained.guess(
                self._hidden, depth, self._width, self._lm_head, chances=True
            )
            shape = best_first(guesses.chances, nodes, self._params.min_chance)
        else:
            shape = self._fixed(nodes, depth)
            if not shape.ranks:
                return TokenTree.root_only(root)
            guesses = self._trained.guess(
                self._hidden, shape.depth, shape.width, self._lm_head
            )
        places = list(zip(shape.depths, shape.ranks, strict=True))
        sure = zip(shape.evidence, shape.depths, strict=True)
        return TokenTree(
            [root, *(guesses.tokens[depth - 1][rank] for depth, rank in places)],
            (-1, *shape.parents),
            evidence=[0, *(base + guesses.levels[depth - 1] for base, depth in sure)],
        )

    def _fixed(self, nodes: int, depth: int) -> Shape:
        if self._kind == "chain":
            return chain(min(depth, nodes))
        if self._trained.paths is not None:
            return calibrated(self._trained.paths, nodes, depth, self._width)
        return assumed(self._ranks, nodes, depth, self._width)
