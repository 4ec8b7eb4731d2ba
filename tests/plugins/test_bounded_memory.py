"""A decoder that lives long doesn't grow with the requests it has answered."""

from __future__ import annotations

import gc

import pytest
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.strategy import Drafter
from adaptspec.testing.fakes import random_ids
from adaptspec.testing.strategies import target_and_draft
from adaptspec_plugins import register_strategies

STRATEGIES = {cls.name: cls for cls in register_strategies()}


def alive(kind: type) -> int:
    gc.collect()
    return sum(issubclass(type(found), kind) for found in gc.get_objects())


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
    kinds = (torch.Tensor, Drafter, Run)
    before = [alive(kind) for kind in kinds]
    answer(8)
    assert [alive(kind) for kind in kinds] == before
