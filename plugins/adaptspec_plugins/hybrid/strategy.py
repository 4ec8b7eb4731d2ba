"""Several drafters' proposals in one tree, as large as the hardware pays for.

After SAM-Decoding (arXiv:2411.10666), which joins a retrieval drafter with a model,
and Sequoia (arXiv:2402.12374), which fits the tree to the hardware; chances are learnt
while decoding and node by node, so any drafter can join.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from adaptspec.host import Host
from adaptspec.params import DraftingParams, Tunable
from adaptspec.strategy import (
    Context,
    Drafter,
    Observes,
    Outcome,
    Strategy,
    Target,
    TokenTree,
    union,
)
from adaptspec_plugins.hybrid.candidates import Candidates
from adaptspec_plugins.hybrid.chances import Calibration, Marks
from adaptspec_plugins.hybrid.forward_cost import ForwardCost
from adaptspec_plugins.hybrid.members import Member, MemberDrafter, Members
from adaptspec_plugins.hybrid.pace import Pace
from adaptspec_plugins.hybrid.plan import (
    TreePlan,
    best_first,
    best_tree,
    likeliest_path,
)

if TYPE_CHECKING:
    import torch

    from adaptspec.model.language_model import LanguageModel


class HybridParams(DraftingParams):
    """The rest is learnt: chances while decoding, costs from the clock."""

    draft_length: Annotated[int, Tunable(4, 64, log=True)] = Field(
        default=24, ge=1, le=256
    )
    use_draft: Annotated[bool, Tunable()] = Field(
        default=True, description="ask the draft model, if there is one, where it pays"
    )


class Hybrid(Strategy):
    """Members propose, the likeliest nodes that pay for themselves are verified.

    Every strategy with ``joins`` is a member. Under a clock that varies the trees do
    too; the output doesn't, since proposals are deterministic given the tree.
    """

    name = "hybrid"
    summary = "merges several drafters' proposals in one tree of what pays here"
    reference = "arXiv:2411.10666"
    Params = HybridParams
    replays = True
    general = True
    knowledge = 3  # 2 numbered token recycling's evidence otherwise
    params: HybridParams

    def __init__(self, params: Any = None) -> None:
        super().__init__(params)
        self._met: Members | None = None
        self._forward: tuple[LanguageModel, ForwardCost] | None = None
        self._chosen: tuple[tuple[Any, ...], list[Member]] | None = None

    def meet(self, strategies: Mapping[str, type[Strategy]]) -> None:
        """Take in every other strategy that joins."""
        self._met = Members(strategies)

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """Exchange the counts of all members and what the members know themselves."""
        return self._members.sync(stored)

    def observes(self, model: LanguageModel) -> Observes:
        """All that a member may need; each is given only what it asked for."""
        return union(
            [
                member.strategy.observes(model)
                for member in self._members
                if self._may_join(member, model)
            ]
        )

    def uses_draft(self, model: LanguageModel, draft: LanguageModel) -> bool:
        """Whether a member that can run here does."""
        return any(
            member.strategy.uses_draft(model, draft)
            for member in self._available(model, draft)
        )

    def start(self, target: Target) -> Drafter:
        """Start every member that can run here."""
        members = self._available(target.model, target.draft)
        if self._forward is None or self._forward[0] is not target.model:
            self._forward = target.model, ForwardCost(target.model.latency)
        return _HybridDrafter(
            target,
            members,
            self._members.calibration,
            self._members.pace,
            self._forward[1],
            self.params.draft_length,
        )

    @property
    def _members(self) -> Members:
        if self._met is None:
            self._met = Members(Host.installed().strategies)
        return self._met

    def _may_join(self, member: Member, model: LanguageModel) -> bool:
        cls = type(member.strategy)
        if cls.requires.draft is not None:
            return self.params.use_draft
        return cls.unavailable(model, None) is None

    def _available(
        self, model: LanguageModel, draft: LanguageModel | None
    ) -> list[Member]:
        """Comparing vocabularies takes milliseconds, so the answer is kept."""
        given = model, draft, tuple(model.heads.values())
        if self._chosen is None or self._chosen[0] != given:
            found = [
                member
                for member in self._members
                if self._may_join(member, model)
                and type(member.strategy).unavailable(model, draft) is None
            ]
            self._chosen = given, found
        return self._chosen[1]


class _HybridDrafter(Drafter):
    def __init__(
        self,
        target: Target,
        members: Sequence[Member],
        calibration: Calibration,
        pace: Pace,
        forward: ForwardCost,
        max_nodes: int,
    ) -> None:
        self._clock = target.clock
        self._trees = target.trees
        self._calibration = calibration
        self._forward = forward
        self._max_nodes = max_nodes
        self._shifts = calibration.fresh()
        self._all, self._pace = pace, pace.fresh()
        self._rate = 0.0
        self._began = 0.0
        self._candidates: Candidates | None = None
        self._plan: TreePlan | None = None
        self._sent = 0.0
        self._drafters: list[MemberDrafter] = []
        try:
            for member in members:
                self._drafters.append(MemberDrafter(member, target))
        except BaseException:
            self.close()
            raise

    def propose(self, context: Context) -> TokenTree:
        began = self._began = self._clock()
        self.read_seconds = 0.0
        candidates = Candidates(context.ids[-1], context.room - 1)
        self._candidates = candidates
        most = min(self._max_nodes, context.max_nodes)
        self._plan = None
        if most < 1 or context.room < 2:
            return self._send(TokenTree.root_only(context.ids[-1]))
        plain = self._forward(1)
        # Not below plain decoding's, which is there for the asking.
        self._rate = max(self._pace.tokens, 1.0) / plain
        costly = [member for member in self._drafters if member.is_costly(plain)]
        for member in self._drafters:
            if member not in costly:
                self._ask(member, context)
        plan = self._best(most, self._clock() - began)
        for member in costly:
            if member.wants_call(plan, self._rate, context):
                self._ask(member, context)
                before, plan = plan, self._best(most, self._clock() - began)
                member.judged(before, plan, self._rate)
        for member in costly:
            member.value.passed(plan.seconds)
        self._plan = plan
        return self._send(candidates.tree(plan.nodes))

    def observe(self, outcome: Outcome) -> None:
        began = self._clock()
        if outcome.tree is not None and self._candidates is not None:
            self._forward.observe(len(outcome.tree), began - self._sent)
            self._learn(self._candidates, outcome.emitted)
            self._candidates = None  # the guard may pass the next step over
        for member in self._drafters:
            member.observe(outcome)
        if outcome.tree is not None and self._plan is not None:
            steps = (self._clock() - self._began) / self._forward(1)
            for pace in (self._all, self._pace):
                pace.add(len(outcome.emitted), steps)
            self._plan = None

    def close(self) -> None:
        for member in self._drafters:
            member.drafter.close()

    def _ask(self, member: MemberDrafter, context: Context) -> None:
        """Merge a member's proposal."""
        assert self._candidates is not None
        least = self._rate * member.value.candidate.value
        began = self._clock()
        asked = dataclasses.replace(context, least=least, readable=None)
        tree = member.drafter.propose(asked)
        seconds = self._clock() - began
        self.read_seconds += member.proposed(seconds, tree.proposed, len(context.ids))
        self._candidates.add(tree, member.index, member.name)

    def _best(self, most: int, spent: float) -> TreePlan:
        assert self._candidates is not None
        grow = best_first if self._trees else likeliest_path
        nodes = grow(self._candidates, self._chance, most)
        depths = self._candidates.depths
        return best_tree(nodes, depths, self._forward, spent, self._rate, most)

    def _chance(self, marks: Marks) -> float:
        return self._calibration.chance(marks, self._shifts)

    def _send(self, tree: TokenTree) -> TokenTree:
        self._sent = self._clock()
        return tree

    def _learn(self, candidates: Candidates, emitted: Sequence[int]) -> None:
        """Every candidate after an emitted token is shown right or wrong by the next.

        Verified or not: so the choice of nodes biases nothing.
        """
        path = candidates.walk(emitted)
        for at, node in enumerate(path[: len(emitted)]):
            for token, child in candidates.children[node].items():
                marks, right = candidates.marks[child], token == emitted[at]
                self._calibration.learn(marks, self._shifts, right)
