"""The strategies that join a hybrid, and their drafters in one sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adaptspec.strategy import Outcome, Strategy, Target
from adaptspec_plugins.hybrid.chances import Calibration, shipped
from adaptspec_plugins.hybrid.pace import Pace
from adaptspec_plugins.hybrid.when_to_ask import (
    Exploration,
    MemberCost,
    SequenceExploration,
    Turns,
)

if TYPE_CHECKING:
    import torch


class Member:
    """A strategy that joins, and what was seen of it."""

    def __init__(self, index: int, strategy: Strategy) -> None:
        self.index = index
        self.strategy = strategy
        self.cost = MemberCost(strategy.requires.draft is not None)


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
        self.exploration = Exploration()
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


class Run:
    """One member's drafter in one sequence."""

    def __init__(
        self, member: Member, target: Target, exploration: SequenceExploration
    ) -> None:
        self.index = member.index
        self.name = member.strategy.name
        self.cost = member.cost
        self.drafter = member.strategy.start(target)
        self.observes = member.strategy.observes(target.model)
        self.turns = Turns(member.cost, exploration)

    def observe(self, outcome: Outcome) -> None:
        """Hand on the outcome with the hidden states that the member asked for."""
        wanted = self.observes.hidden_layers
        if outcome.tree is None and self.observes.prefill_hidden == "none":
            wanted = ()
        hidden = {layer: outcome.hidden[layer] for layer in wanted}
        if outcome.tree is None and self.observes.prefill_hidden == "last":
            hidden = {layer: states[-1:] for layer, states in hidden.items()}
        self.drafter.observe(dataclasses.replace(outcome, hidden=hidden))
