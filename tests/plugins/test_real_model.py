"""Real weights: SmolLM2-135M-Instruct in float32, every bundled strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptspec_plugins
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model

PROMPT = [
    {
        "role": "user",
        "content": "Return this list with every x renamed to total: "
        "x = 0, x += 1, x *= 2, print(x), return x",
    }
]
NEW_TOKENS = 24

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.fixture(scope="module")
def target(real_model_path: Path) -> LanguageModel:
    return load_model(real_model_path, dtype="float32")


@pytest.fixture(scope="module")
def truth(real_model_path: Path, target: LanguageModel) -> list[int]:
    untouched = load_model(real_model_path, dtype="float32", accelerate=False)
    ids = target.encode(PROMPT)
    source: Any = untouched.source
    output = source.generate(
        torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    found: list[int] = output[0, len(ids) :].tolist()
    return found


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("autoregressive", {}),
        ("prompt_lookup", {"branches": 3, "policy": "frequent"}),
        ("draft_model", {"draft_length": 4}),
        ("draft_tree", {}),
    ],
)
def test_greedy_output_is_generates_token_for_token(
    name: str, params: dict[str, Any], target: LanguageModel, truth: list[int]
) -> None:
    cls = Host({"bundled": adaptspec_plugins}).strategy(name)
    # The target as its own draft: everything it drafts is right, but for rounding.
    engine = Engine(target, target if cls.requires.draft else None)
    eos = Controls.for_model(target).eos_token_ids
    done = engine.generate(
        cls(cls.Params.parse(params)),
        target.encode(PROMPT),
        Controls.greedy(NEW_TOKENS, eos),
    )
    assert done.token_ids == truth
    if cls.requires.draft:
        assert done.stats.tokens_per_forward > 2
