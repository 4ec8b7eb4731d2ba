"""What strategies would have saved on an answer that was decoded plainly.

A drafter that reads committed tokens alone can be run on an answer once it is there:
each of its proposals is compared with the tokens that came, as a forward would have
done. Its steps are therefore those of a real run without the guard, and only their time
is an estimate: a forward is taken to cost what the model's costs say, or as much as a
plain one where they aren't known; what drafting takes is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptspec.decoding.acceptance import accept_matching
from adaptspec.decoding.engine import Generation, Run
from adaptspec.params import Scalar
from adaptspec.strategy import Outcome, Strategy
from adaptspec.token_tree import TokenTree

NO_LOGITS = torch.empty(0, 0)


@dataclass(frozen=True)
class Shadow:
    """What one strategy would have done on an answer.

    Args:
        strategy: Its name.
        params: Its parameters.
        forwards: Of the target after the prompt's.
        proposed: Candidates.
        accepted: Candidates that were the answer's next tokens.
        tokens_per_forward: Mean tokens committed per forward; 1 is plain decoding.
        ratio: How many times as fast as plain decoding, the prompt's forward left out:
            an estimate. None where nothing was decoded after the first token.
        seconds_saved: By the same estimate; below 0 where it would have lost.
        seconds_draft: What drafting took.
        costs_known: Whether the model's costs of larger forwards were known; or else
            they count as plain ones, and the estimate is the most that can be hoped.
    """

    strategy: str
    params: Mapping[str, Scalar]
    forwards: int
    proposed: int
    accepted: int
    tokens_per_forward: float
    ratio: float | None
    seconds_saved: float
    seconds_draft: float
    costs_known: bool


def token_only(strategy: Strategy, run: Run) -> str | None:
    """Why a strategy's drafter can't be run on an answer's tokens alone; None: it can.

    It goes by what the strategy declares, so third parties' are included.
    """
    cls, model = type(strategy), run.model
    if cls.requires.draft is not None:
        return "it needs a draft model"
    if cls.requires.heads is not None:
        return "it needs trained heads"
    if reason := cls.unavailable(model, None):
        return reason
    observes = strategy.observes(model)
    if observes.hidden_layers:
        return "it reads hidden states"
    if observes.logits or not cls.replays:
        return "it reads what the target makes of its candidates"
    return None


def shadow(strategy: Strategy, run: Run, plain: Generation) -> Shadow:
    """Draft along an answer that ``run`` decoded plainly.

    The strategy learns from the answer as it would have done.

    Args:
        strategy: One that :func:`token_only` has nothing against.
        plain: What ``run`` generated.
    """
    clock, tokens = run.clock, plain.token_ids
    begun = clock()
    target = run.target(None)
    prompt = list(target.prompt)
    drafter = strategy.start(target)
    forwards = proposed = accepted = 0
    rows: list[int] = []
    try:
        first = {len(prompt) - 1: 0}
        drafter.observe(Outcome(None, (), tokens[:1], first, NO_LOGITS))
        done = 1
        while done < len(tokens):
            ids = prompt + tokens[:done]
            context = run.context(ids, forwards)
            tree = run.verifiable(drafter.propose(context), context)
            found = _matching(tree, tokens[done:])
            path = found[: len(tokens) - done]
            emitted = tokens[done : done + len(found)]
            drafter.observe(Outcome(tree, path, emitted, {}, NO_LOGITS))
            forwards, done = forwards + 1, done + len(emitted)
            proposed += tree.proposed
            accepted += min(len(found) - 1, len(emitted))
            rows.append(len(tree))
    finally:
        drafter.close()
    drafting = clock() - begun
    costs = run.model.__dict__.get("latency")
    decoded, seconds = len(tokens) - 1, plain.stats.seconds_decode
    step = seconds / decoded if decoded > 0 else 0.0
    taken = drafting + step * sum(costs(n) / costs(1) if costs else 1.0 for n in rows)
    return Shadow(
        strategy.name,
        strategy.params.model_dump(),
        forwards,
        proposed,
        accepted,
        decoded / forwards if forwards else 1.0,
        seconds / taken if decoded > 0 else None,
        seconds - taken,
        drafting,
        costs is not None,
    )


def _matching(tree: TokenTree, tokens: Sequence[int]) -> Sequence[int]:
    """The nodes on the path of ``tokens``, root first."""
    path: list[int | None] = [*tokens, None]
    return accept_matching(tree, lambda node, taken: path[len(taken)]).path
