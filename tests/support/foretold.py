"""A strategy that is told the answers, and gives them with mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from adaptspec.decoder import Decoder, load
from adaptspec.drop_in.speed_up import SpeedUp
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.strategy import Context, Drafter, Outcome, Strategy, Target, TokenTree
from adaptspec_profiles.memory import MemoryStore


class Foretold(Strategy):
    """Drafts a few tokens of the answer, then a wrong one, and goes on beyond its end.

    Under sampling it also asks for noise that the target will ask for later.

    Answers are looked up by the prompt; where there is none, nothing is drafted.
    """

    name = "foretold"
    summary = "drafts what the test says"
    answers: ClassVar[Mapping[tuple[int, ...], Sequence[int]]] = {}
    open: ClassVar[int] = 0

    @classmethod
    def unavailable(cls, model: Any, draft: Any) -> str | None:
        """Never: a model that verifies nothing gets no drafts."""
        return None

    def start(self, target: Target) -> Drafter:
        """Draft the answer to its prompt."""
        type(self).open += 1
        return _Foretelling(tuple(target.prompt), target)


class _Foretelling(Drafter):
    def __init__(self, prompt: tuple[int, ...], target: Target) -> None:
        self._prompt, self._vocab = prompt, target.model.vocab_size
        self._sampling = target.sampling
        self._answer = list(Foretold.answers.get(prompt, ()))

    def propose(self, context: Context) -> TokenTree:
        done = len(context.ids) - len(self._prompt)
        root = context.ids[-1]
        if not self._sampling.greedy:  # asks about noise of places to come
            self._sampling.coupled(torch.ones(self._vocab), len(context.ids) + 7)
        if not self._answer or context.ids[len(self._prompt) :] != self._answer[:done]:
            return TokenTree.root_only(root)
        right = [*self._answer[done:], 3, 5, 3, 5][: done % 5 + 1]
        wrong = (right[0] + 1) % self._vocab
        return TokenTree.from_paths(
            root, [[*right, wrong], [wrong, wrong]], context.max_nodes
        )

    def observe(self, outcome: Outcome) -> None:
        """Nothing is learnt."""

    def close(self) -> None:
        Foretold.open -= 1


class _Plugin:
    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Foretold]


def foretelling(module: Any, tokenizer: Any = None, **arguments: Any) -> Decoder:
    """A decoder that has this strategy."""
    import adaptspec_plugins

    host = Host({"foretold": _Plugin(), "bundled": adaptspec_plugins})
    return load(module, db=MemoryStore(), host=host, tokenizer=tokenizer, **arguments)


def foretold(module: Any, tokenizer: Any = None) -> SpeedUp:
    """The model's ``generate`` with this strategy, unbound."""
    return SpeedUp(module, foretelling(module, tokenizer), strategy=Foretold.name)


def tell(
    monkeypatch: Any,
    sequences: torch.Tensor,
    width: int,
    mask: torch.Tensor | None = None,
) -> None:
    """Let it know what came after prompts of ``width`` ids, padding included."""
    answers = {}
    times = 1 if mask is None else len(sequences) // len(mask)
    for number, line in enumerate(sequences.tolist()):
        padding = 0 if mask is None else int((mask[number // times] == 0).sum())
        answers[tuple(line[padding:width])] = line[width:]
    monkeypatch.setattr(Foretold, "answers", answers)
