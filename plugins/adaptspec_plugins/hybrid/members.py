"""The strategies that join a hybrid, and their drafters in one sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adaptspec.strategy import Context, Outcome, Strategy, Target
from adaptspec_plugins.hybrid.chances import Calibration, shipped
from adaptspec_plugins.hybrid.pace import Pace
from adaptspec_plugins.hybrid.when_to_ask import CallValue

if TYPE_CHECKING:
    import torch

    from adaptspec_plugins.hybrid.plan import TreePlan


class Member:
    """A strategy that joins, and what was seen of it."""

    def __init__(self, index: int, strategy: Strategy) -> None:
        self.index = index
        self.strategy = strategy
        self.value = CallValue()


class Members:
    """All strategies that join, by name; the order is the marks'."""

    def __init__(self, strategies: Mapping[str, type[Strategy]]) -> None:
        joining = [
            cls for _, cls in sorted(strategies.items()) if cls.joins is not None
        ]
        self._members: list[Member] = []
        for index, cls in enumerate(joining):
            strategy = cls(cls.Params.parse(cls.joins or {}, cls.name))
            strategy.meet(strategies)
            self._members.append(Member(index, strategy))
        self.calibration = Calibration(
            [cls.name for cls in joining],
            [cls.name for cls in joining if cls.requires.draft is not None],
            shipped(),
        )
        self.pace = Pace()

    def __iter__(self) -> Iterator[Member]:
        """In the order of their indices."""
        return iter(self._members)

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """The counts of all and each one's own knowledge, as :meth:`Strategy.sync`."""
        held = self.calibration.sync(stored)
        for member in self._members:
            strategy = member.strategy
            if not strategy.knowledge:
                continue
            # The version is part of the key: another one's tensors are left out.
            prefix = f"{strategy.name}@{strategy.knowledge}/"
            theirs = {
                key.removeprefix(prefix): tensor
                for key, tensor in (stored or {}).items()
                if key.startswith(prefix)
            }
            known = strategy.sync(theirs or None)
            held.update({prefix + key: tensor for key, tensor in known.items()})
        return held


class MemberDrafter:
    """One member's drafter in one sequence.

    Args:
        costly: A proposal that takes more than this share of a plain forward is asked
            for only where it pays; a draft model's is so always.
    """

    def __init__(self, member: Member, target: Target, costly: float = 0.02) -> None:
        self.index = member.index
        self.name = member.strategy.name
        self.value = member.value
        self.drafter = member.strategy.start(target)
        self.observes = member.strategy.observes(target.model)
        self._costly = costly
        self._drafts = member.strategy.requires.draft is not None
        self._calls = 0
        self._missed = 0.0  # tokens that calls would have gained before the first

    def is_costly(self, plain: float) -> bool:
        """Whether to ask only where it pays; ``plain`` is a plain forward's seconds."""
        return self._drafts or self.value.proposal.value > self._costly * plain

    def wants_call(self, plan: TreePlan, pace: float, context: Context) -> bool:
        """Whether to ask a costly member; ``plan`` is the step without it.

        The first call reads the prompt, and the answer may end at any time: it is made
        once the calls left out would have been worth as much as that reading, if the
        guard lets it read all.

        Args:
            pace: Tokens per second of the steps around.
            context: Says what a first call reads, and how much it may.
        """
        gain = self.value.gain(plan, pace)
        tokens = len(context.ids)
        reading = 0.0 if self._calls else self.value.reading(tokens)
        self._missed += max(0.0, gain)
        many = context.readable is not None and tokens > context.readable
        if many and self._drafts and not self._calls:
            return False
        if gain > 0 and self._missed >= pace * reading:
            return True
        return self.value.affords(reading - gain / pace)

    def proposed(self, seconds: float, candidates: int, prompt: int) -> float:
        """A proposal of so many candidates took ``seconds``.

        Returns:
            The seconds of reading the prompt, which a sequence's first call does.
        """
        self._calls += 1
        if self._calls == 1 and self._drafts:
            return self.value.read(seconds, prompt, candidates)
        self.value.proposed(seconds, candidates)
        return 0.0

    def judged(self, before: TreePlan, after: TreePlan, pace: float) -> None:
        """What was just proposed turned one plan into another."""
        if self._calls > 1:  # the first took long for the prompt
            self.value.called(before, after, pace)

    def observe(self, outcome: Outcome) -> None:
        """Hand on the outcome with the hidden states that the member asked for."""
        if not outcome.hidden:
            self.drafter.observe(outcome)
            return
        wanted = self.observes.hidden_layers
        if outcome.tree is None and self.observes.prefill_hidden == "none":
            wanted = ()
        hidden = {layer: outcome.hidden[layer] for layer in wanted}
        if outcome.tree is None and self.observes.prefill_hidden == "last":
            hidden = {layer: states[-1:] for layer, states in hidden.items()}
        self.drafter.observe(dataclasses.replace(outcome, hidden=hidden))
