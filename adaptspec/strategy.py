"""What every decoding strategy promises: it proposes, the engine alone verifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from adaptspec.params import Params, Scalar
from adaptspec.token_ids import Continuation
from adaptspec.token_tree import Drawn, TokenTree

if TYPE_CHECKING:
    import torch

    from adaptspec.decoding.acceptance import Typical
    from adaptspec.model.cache import TreeCache
    from adaptspec.model.language_model import LanguageModel

__all__ = [
    "Baseline",
    "BaselineRun",
    "Context",
    "Continuation",
    "Drafter",
    "Drawn",
    "NoParams",
    "Observes",
    "Outcome",
    "Requirements",
    "SamplingDistribution",
    "Strategy",
    "Target",
    "TokenTree",
    "reading_from",
    "union",
]


class NoParams(Params):
    """A strategy without parameters."""


@dataclass(frozen=True)
class Requirements:
    """What a strategy can't decode without.

    Args:
        draft: The draft model it runs: one of the target's vocabulary, or one with a
            tokenizer of its own.
        trees: Whether the target must verify trees, not chains only.
        heads: The kind of trained heads it drafts with (``--heads``).
    """

    draft: Literal["same vocabulary", "another tokenizer"] | None = None
    trees: bool = False
    heads: str | None = None


@dataclass(frozen=True)
class Observes:
    """What a drafter observes of the target's forward passes beside token ids.

    Args:
        hidden_layers: Indices into the model's ``hidden_states`` (0 is the embedding
            output, -1 the post-norm last state) delivered at every evaluated node.
        prefill_hidden: Prompt positions whose hidden states are delivered.
        prefill_logits: How many of the prompt's last positions get logits (at least
            the last one always does).
        logits: Whether it reads logits at all; the engine has them anyway, a replay
            only where they were recorded.
    """

    hidden_layers: tuple[int, ...] = ()
    prefill_hidden: Literal["none", "last", "all"] = "none"
    prefill_logits: int = 1
    logits: bool = False


def union(observes: Sequence[Observes]) -> Observes:
    """What serves all of ``observes``."""
    prefills: tuple[Literal["none", "last", "all"], ...] = ("none", "last", "all")
    return Observes(
        hidden_layers=tuple(sorted({i for one in observes for i in one.hidden_layers})),
        prefill_hidden=max(
            (one.prefill_hidden for one in observes), key=prefills.index, default="none"
        ),
        prefill_logits=max((one.prefill_logits for one in observes), default=1),
        logits=any(one.logits for one in observes),
    )


class SamplingDistribution(Protocol):
    """The sampling controls in force, for drafters that sample or rank.

    A grammar's mask is (``json_schema``, ``regex``, ``grammar``). A caller's own logits
    processors aren't: one that keeps state must not be asked about drafts. So the
    distribution may differ from the target's, which a draft's distribution may always
    do. Probabilities are NaN throughout where no token has a score.

    ``ids`` are best given as a :class:`Continuation` of ``context.ids``: the ids are
    then never copied, however long they are.
    """

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""

    @property
    def temperature(self) -> float:
        """0 for greedy."""

    def probs(self, ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Chances ``[vocab]`` of the token after ``ids`` under the controls (float32).

        Greedy gives a one-hot distribution.
        """

    def likeliest(self, ids: Sequence[int], logits: torch.Tensor) -> int:
        """The most likely token after ``ids`` under the controls; of equals, the first.

        What ``probs`` is one-hot at if ``greedy``, without building that distribution.
        """

    def draw(self, probs: torch.Tensor, count: int = 1) -> list[int]:
        """Draw up to ``count`` distinct tokens, without replacement, in draw order.

        Reproducible for the seed; fewer come where the distribution's support is
        smaller, none where the distribution is NaN.
        """

    def coupled(self, probs: torch.Tensor, position: int) -> int:
        """The token the target's own noise at ``position`` picks from ``probs``.

        A function of the seed and the distribution alone, so a proposal made of such
        tokens is ``Drawn.DETERMINISTIC``. ``position`` is the index the token would
        have in ids.
        """


@dataclass(frozen=True)
class Target:
    """The model that is decoded, as a drafter may use it.

    ``cache`` is the running sequence's: ``propose`` may append to it but must leave its
    length as it was.
    """

    model: LanguageModel
    draft: LanguageModel | None
    cache: TreeCache | None
    prompt: Sequence[int]
    sampling: SamplingDistribution
    trees: bool  # whether the target verifies trees, or chains only
    clock: Callable[[], float]


@dataclass
class Context:
    """What a drafter sees before a step.

    Args:
        ids: Prompt and committed tokens; the last is the tree's root. Read only.
        room: How many tokens may still be emitted; deeper nodes than ``room - 1`` are
            cut (the step itself emits one more).
        max_nodes: Most candidates the engine verifies in one step.
        step: Steps done before this one.
        least: Chance of acceptance below which a candidate isn't worth one more forward
            of a draft model; 0 if unknown.
        readable: How many of ``ids`` a draft model may read in this step, None: all.
            See :func:`reading_from`.
    """

    ids: Sequence[int]
    room: int
    max_nodes: int
    step: int
    least: float = 0.0
    readable: int | None = None


def reading_from(first: int, read: int, tokens: int, readable: int | None) -> int:
    """From which committed token on a draft model has read after this step.

    All of them where it may read all; or else it goes on where it was if it may, and
    where it may not it begins anew with as many of the last ones as it may read.

    Args:
        first: From which on it has read so far.
        read: Up to which; 0: none.
        tokens: How many are committed.
        readable: As in :class:`Context`.
    """
    if readable is None or readable >= tokens:
        return 0
    return first if tokens - read <= max(readable, 1) else tokens - max(readable, 1)


@dataclass(frozen=True)
class Outcome:
    """What one target forward showed.

    Args:
        tree: What was verified (after cuts), ``None`` for the prefill.
        path: Accepted nodes, root first (empty for the prefill).
        emitted: Tokens committed by the step: the accepted ones and one more, cut at
            EOS or the limit.
        rows: Node -> row of ``logits``; for the prefill, prompt position -> row.
        logits: ``[rows, vocab]`` as the model gave them; no later step writes to them,
            so that they may be kept.
        hidden: Layer -> ``[nodes or prompt positions, hidden]``, see ``Observes``.
        best: Row -> likeliest token, where the engine looked for it; else empty. It
            may be one that a grammar forbids.
        origins: Node -> the node of the proposal that it was, -1 for a token that a
            grammar forced. Empty: nodes are those of the proposal.
        forced: Nodes 1 to ``forced`` are drafts of a grammar, not of the drafter.
    """

    tree: TokenTree | None
    path: Sequence[int]
    emitted: Sequence[int]
    rows: dict[int, int]
    logits: torch.Tensor
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    best: Sequence[int] = ()
    origins: Sequence[int] = ()
    forced: int = 0


class Drafter(ABC):
    """One sequence's drafting state.

    Attributes:
        read_seconds: What of the last proposal's time went into reading the prompt with
            a draft model. One that reads it in its first proposal needn't say so.
    """

    read_seconds: float = 0.0

    @abstractmethod
    def propose(self, context: Context) -> TokenTree:
        """Candidate continuations of ``context.ids``, rooted at its last token.

        Not asked at every step: the guard or a hybrid may pass some over, so what was
        committed is read from ``context.ids``.
        """

    def observe(self, outcome: Outcome) -> None:  # noqa: B027 - most need nothing
        """Learn from a target forward: once after the prefill, then after each step."""

    def close(self) -> None:  # noqa: B027
        """The sequence has ended, normally or not."""


class Strategy(ABC):
    """A way to draft. An instance is one setting; it may keep state across requests.

    Class attributes:
        name: Unique, lower_snake_case.
        summary: One line: what it does.
        reference: The paper or repository it comes from.
        Params: Its parameters, declared once.
        requires: What it can't decode without.
        lossless: False only for what changes the output's distribution; shown
            everywhere.
        joins: Parameters with which its drafter joins a hybrid's tree, None if it
            doesn't. Joining drafters propose deterministically.
        replays: True if the drafter reads only committed tokens, their hidden states
            (of the prompt, the last token's at most) and, with :attr:`Observes.logits`,
            logits, and does with those of committed tokens alone nearly as well. The
            tuner can then also score it on a recording of plain decoding.
        general: True if it serves prompts of any kind; the tuner confirms it in every
            class, so that there is an answer for prompts of no class.
        knowledge: Version of the knowledge it keeps across requests, 0 for none; see
            :meth:`sync`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    Params: ClassVar[type[Params]] = NoParams
    requires: ClassVar[Requirements] = Requirements()
    lossless: ClassVar[bool] = True
    joins: ClassVar[Mapping[str, Scalar] | None] = None
    replays: ClassVar[bool] = False
    general: ClassVar[bool] = False
    knowledge: ClassVar[int] = 0

    def __init__(self, params: Any = None) -> None:
        self.params = self.Params() if params is None else params

    @property
    def acceptance(self) -> Typical | None:
        """The lossy rule by which sampled output is accepted, None for the exact one.

        A strategy with such a rule must say ``lossless = False``. Greedy decoding is
        exact whatever the rule.
        """
        return None

    def meet(self, strategies: Mapping[str, type[Strategy]]) -> None:  # noqa: B027
        """Called once before the first :meth:`start` with all registered strategies."""

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """Merge the stored state into this instance; return the state to save.

        Called under the file's lock. Another process may have written since the last
        call, so the returned state must contain both what was stored and what was
        learnt here since then, within the strategy's own bound. ``stored`` is None if
        there is no readable file of this model, strategy and version. Values are CPU
        tensors.
        """
        return {}

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Why this can't run on ``model`` with ``draft``, or None if it can."""
        if cls.requires.draft == "same vocabulary":
            if reason := _draft_problem(model, draft):
                return reason
            if draft is not None and draft.capability.level == "plain":
                return f"the draft model can't roll back: {draft.capability.reason}"
        if model.capability.level == "plain":
            return f"the target can't verify drafts: {model.capability.reason}"
        if cls.requires.trees and model.capability.level != "tree":
            return f"needs tree attention: {model.capability.reason}"
        return None

    def uses_draft(self, model: LanguageModel, draft: LanguageModel) -> bool:
        """Whether this setting runs ``draft`` when it decodes with ``model``.

        The tuner counts the draft model's memory for settings that do. Override it
        where parameters decide; the default is what :attr:`requires` declares.
        """
        return self.requires.draft is not None

    def observes(self, model: LanguageModel) -> Observes:
        """What the drafter observes of the target's forward passes."""
        return Observes()

    @abstractmethod
    def start(self, target: Target) -> Drafter:
        """Open the drafting state of one sequence, before it observes the prefill."""


@dataclass(frozen=True)
class BaselineRun:
    """One generation of another engine, on the same tokens.

    Args:
        token_ids: The new tokens.
        seconds: Prefill and decoding together.
        target_forwards: Forwards after the one that read the prompt.
        seconds_prefill: Time until the first tokens came, None where it isn't known.
        first_tokens: How many came then (more than one if they were drafted).
    """

    token_ids: list[int]
    seconds: float
    target_forwards: int | None = None
    seconds_prefill: float | None = None
    first_tokens: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over the tokens after the first ones; 0 if there are none."""
        decoded = len(self.token_ids) - self.first_tokens
        seconds = self.seconds - (self.seconds_prefill or 0.0)
        return decoded / seconds if decoded > 0 and seconds > 0 else 0.0


class Baseline(ABC):
    """Another engine's decoding, measured beside ours and never selected."""

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    Params: ClassVar[type[Params]] = NoParams
    requires: ClassVar[Requirements] = Requirements()

    def __init__(self, params: Any = None) -> None:
        self.params = self.Params() if params is None else params

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Why this can't run on ``model`` with ``draft``, or None if it can."""
        if cls.requires.draft is None:
            return None
        return _draft_problem(model, draft)

    @abstractmethod
    def run(
        self,
        model: LanguageModel,
        draft: LanguageModel | None,
        ids: Sequence[int],
        max_new_tokens: int,
    ) -> BaselineRun:
        """Decode greedily; state kept between runs is reset."""


def _draft_problem(model: LanguageModel, draft: LanguageModel | None) -> str | None:
    """Why ``draft`` can't draft for ``model``, or None."""
    if draft is None:
        return "needs a draft model, none was given (--draft-model)"
    if reason := draft.vocabulary_mismatch(model):
        return f"needs a draft model of the same vocabulary: {reason}"
    return None
