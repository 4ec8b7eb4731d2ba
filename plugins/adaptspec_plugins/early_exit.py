"""The target's own lower layers draft a chain of tokens.

Self-speculative decoding by early exit (LayerSkip, Elhoushi et al. 2024,
arXiv:2404.16710), with one cache for draft and target, and a pause where the model
wasn't trained for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated
from weakref import WeakKeyDictionary

from pydantic import Field

from adaptspec.params import GatedParams, Tunable
from adaptspec.strategy import Context, Drafter, Outcome, Strategy, Target, TokenTree
from adaptspec_plugins.draft.drawing import DraftChain, DraftSampling

if TYPE_CHECKING:
    import torch
    from torch import nn

    from adaptspec.model.language_model import LanguageModel

# Rounding moves keys and values by less; another layer's differ by about 1.
TOLERANCE = 0.05
PROBE_TOKENS = 3

# Steps with one drafted token each that decide whether drafting goes on, steps without
# drafts after that, and what drafting may lose before the next trial, in forwards.
TRIAL_STEPS = 4
FIRST_PAUSE = 32
TOLERATED_LOSS = 2.0
MEMORY = 0.95


class EarlyExitParams(GatedParams):
    """``draft_sampling`` matters only under sampling."""

    depth: Annotated[float, Tunable(0.1, 0.75, step=0.05)] = Field(
        default=0.25, gt=0.0, lt=1.0, description="share of the layers that draft"
    )
    tokens: Annotated[int, Tunable(1, 8)] = Field(
        default=4, ge=1, le=12, description="most tokens drafted per step"
    )
    stop: Annotated[float, Tunable(0.0, 0.9, step=0.1)] = Field(
        default=0.0,
        ge=0.0,
        le=0.9,
        description=(
            "stop after a token the lower layers give less probability than this"
        ),
    )
    pause: Annotated[bool, Tunable()] = Field(
        default=True,
        description="draft nothing for a while where drafts cost more than they save",
    )
    draft_sampling: DraftSampling = Field(
        default="independent",
        description=(
            "under sampling: accept more, or emit plain sampling's tokens exactly"
        ),
    )


class EarlyExit(Strategy):
    """Needs no draft model; pays where the checkpoint was trained to exit early."""

    name = "early_exit"
    summary = "the target's own lower layers draft a chain"
    reference = "arXiv:2404.16710"
    Params = EarlyExitParams
    params: EarlyExitParams

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Also why the lower layers can't run alone on the target's cache."""
        reason = super().unavailable(model, draft)
        if reason is None:
            if model not in _refusals:
                _refusals[model] = _refusal(model)
            reason = _refusals[model]
        return reason

    def start(self, target: Target) -> Drafter:
        """Cut the view; it takes about a millisecond and holds no weights."""
        return _LowerLayers(self.params, target)


_refusals: WeakKeyDictionary[LanguageModel, str | None] = WeakKeyDictionary()


def exit_layer(depth: float, layers: int) -> int:
    """How many of ``layers`` draft: at least one, at most all but one."""
    return max(1, min(round(depth * layers), layers - 1))


class _LowerLayers(Drafter):
    def __init__(self, params: EarlyExitParams, target: Target) -> None:
        assert target.cache is not None
        layers = len(target.cache.rows)
        self._tokens = params.tokens
        self._view = target.model.shallow(exit_layer(params.depth, layers))
        self._cache = target.cache.lower(exit_layer(params.depth, layers))
        self._chain = DraftChain(target.sampling, params.draft_sampling, params.stop)
        price = _weights(self._view.model) / _weights(target.model.model)
        self._pace = Pace(price) if params.pause else None

    def propose(self, context: Context) -> TokenTree:
        count = min(self._tokens, context.room - 1, context.max_nodes)
        if self._pace is not None:
            count = min(count, self._pace.most(self._tokens))
        committed = self._cache.length

        def after(drafted: Sequence[int]) -> torch.Tensor:
            newest = [*context.ids[-1:], *drafted][-1]
            return self._view.prefill([newest], self._cache).logits[0]

        try:
            return self._chain.draft(context.ids, count, after)
        finally:
            self._cache.truncate(committed)

    def observe(self, outcome: Outcome) -> None:
        if self._pace is not None and outcome.tree is not None:
            self._pace.record(outcome.tree.proposed, max(0, len(outcome.path) - 1))


class Pace:
    """How many tokens to draft, from what drafting brought so far.

    A trial drafts one token a step: the first token is the likeliest to be right, so
    where it doesn't pay no longer draft does. A lost trial, or later a loss, pauses
    drafting; each pause is twice as long as the one before, until a trial is won.

    Args:
        price: What drafting a token costs, in forwards of the target. Accepting one
            saves a forward.
    """

    def __init__(self, price: float) -> None:
        self._price = price
        self._balance = 0.0
        self._trial = TRIAL_STEPS  # steps left of it
        self._pause = FIRST_PAUSE
        self._paused = 0  # steps left

    def most(self, tokens: int) -> int:
        """Most tokens to draft in this step, up to ``tokens``; asked once a step."""
        if self._paused:
            self._paused -= 1
            return 0
        return 1 if self._trial else tokens

    def record(self, drafted: int, accepted: int) -> None:
        """What became of a step's draft; nothing is learnt where none was."""
        if not drafted:
            return
        self._balance = MEMORY * self._balance + accepted - drafted * self._price
        if self._trial:
            self._trial -= 1
            if self._trial:
                return
            if self._balance > 0:
                self._pause = FIRST_PAUSE
                return
        elif self._balance > -TOLERATED_LOSS:
            return
        self._paused, self._pause = self._pause, 2 * self._pause
        self._trial, self._balance = TRIAL_STEPS, 0.0


def _refusal(model: LanguageModel) -> str | None:
    """Why the target's cache can't serve its lower layers, found out by trying."""
    layers = int(model.config.num_hidden_layers)
    if layers < 2:
        return f"needs at least two decoder layers, {model.name} has {layers}"
    tokens = [token % model.vocab_size for token in range(PROBE_TOKENS)]
    exit_at = exit_layer(0.5, layers)
    whole = model.new_cache(len(tokens))
    lower = model.new_cache(len(tokens)).lower(exit_at)
    model.prefill(tokens, whole)
    if any(layer.length != len(tokens) for layer in whole.rows):
        return f"layers of {model.name} share keys and values"
    try:
        model.shallow(exit_at).prefill(tokens, lower)
    except Exception as error:  # whatever the model's forward raises is a verdict
        text = str(error).strip().splitlines()
        return (
            f"the lower layers of {model.name} don't run alone: "
            f"{type(error).__name__}: {text[0] if text else ''}"
        )
    for alone, within in zip(lower.rows, whole.rows, strict=False):
        assert within.keys is not None
        assert within.values is not None
        if (
            alone.keys is None
            or alone.values is None
            or alone.length != len(tokens)
            or _distance(alone.keys, within.keys) > TOLERANCE
            or _distance(alone.values, within.values) > TOLERANCE
        ):
            return f"the lower layers of {model.name} cache something else alone"
    return None


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-9))


def _weights(model: nn.Module) -> int:
    """Weights that a token's forward multiplies; of an embedding it reads a row."""
    count = 0
    for module in model.modules():
        if hasattr(module, "num_embeddings"):
            continue
        sizes = [getattr(module, name, 0) for name in ("in_features", "out_features")]
        # A packed layer keeps its weight where parameters() doesn't see it.
        count += sizes[0] * sizes[1] or sum(
            p.numel() for p in module.parameters(recurse=False) if p.dim() > 1
        )
    return count
