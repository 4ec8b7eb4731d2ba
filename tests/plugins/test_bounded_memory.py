"""A decoder that lives long doesn't grow with the requests it has answered."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.strategy import Drafter
from adaptspec.testing.fakes import random_ids
from adaptspec.testing.strategies import target_and_draft
from adaptspec_plugins import register_strategies

STRATEGIES = {cls.name: cls for cls in register_strategies()}


KINDS = (torch.Tensor, Drafter, Run)


def alive() -> list[int]:
    """How many objects of each of the kinds there are."""
    gc.collect()
    counts = Counter(map(type, gc.get_objects()))
    return [
        sum(count for found, count in counts.items() if issubclass(found, kind))
        for kind in KINDS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_no_request_leaves_tensors_or_state_behind(name: str) -> None:
    model, draft = target_and_draft("llama")
    cls = STRATEGIES[name]
    if reason := cls.unavailable(model, draft):
        pytest.skip(reason)
    strategy, engine = cls(), Engine(model, draft)

    def answer(requests: int) -> None:
        for request in range(requests):
            ids = random_ids(9 + request, seed=request)
            engine.generate(strategy, ids, Controls.greedy(12))

    answer(4)
    before = alive()
    answer(8)
    assert alive() == before
