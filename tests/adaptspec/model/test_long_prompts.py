"""Long prompts are read in parts: the same rows, in memory that grows with the length
and not with its square."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.model import language_model as models
from adaptspec.model.forward import PlainCache
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Strategy
from adaptspec.testing.fakes import (
    ARCHITECTURES,
    hf_greedy,
    random_ids,
    tiny_model,
)
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.prompt_lookup import PromptLookup

PART = 5


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                held = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, held)
        return made


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PART_TOKENS", PART)


def lengths_read(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward of the module gets from now on."""
    lengths: list[int] = []
    forward = model.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counting)
    return lengths


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("count", [4 * PART, 4 * PART + 1, 23, 5 * PART, 41])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES])
def test_a_prompt_read_in_parts_is_continued_as_generate_does(
    architecture: str, count: int
) -> None:
    model = tiny_model(architecture)
    prompt = random_ids(count, seed=count)
    expected = hf_greedy(model, prompt, 12)
    strategies: list[Strategy] = [Autoregressive()]
    if model.capability.level != "plain":
        strategies += [PromptLookup()]
    for strategy in strategies:
        done = Engine(model).generate(strategy, prompt, Controls.greedy(12))
        assert done.token_ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, PART, PART + 2, 100])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral", "gpt2"])
def test_logits_states_and_rows_are_those_of_one_forward(
    architecture: str, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    _ = model.capability
    prompt = random_ids(23, seed=2)
    whole_cache, cache = model.new_cache(), model.new_cache()
    whole = model.prefill(prompt, whole_cache, last=last, hidden_layers=(0, -1))
    monkeypatch.setattr(models, "PART_TOKENS", PART)
    lengths = lengths_read(model, monkeypatch)
    found = model.prefill(prompt, cache, last=last, hidden_layers=(0, -1))
    assert lengths == [5, 5, 5, 5, 3]
    assert found.rows == whole.rows
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-3, atol=1e-3)
    for layer in (0, -1):
        torch.testing.assert_close(
            found.hidden[layer], whole.hidden[layer], rtol=1e-3, atol=1e-3
        )
    assert cache.length == whole_cache.length == 23
    for ours, theirs in zip(cache.rows, whole_cache.rows, strict=True):
        assert ours.keys is not None
        assert theirs.keys is not None
        torch.testing.assert_close(
            ours.keys[:, :, :23], theirs.keys[:, :, :23], rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_tokens_behind_a_long_prompt_are_read_in_parts_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("gemma3")
    _ = model.capability
    prompt = random_ids(35, seed=3)
    cache = model.new_cache()
    model.prefill(prompt[:11], cache)
    lengths = lengths_read(model, monkeypatch)
    found = model.prefill(prompt[11:], cache, last=2)
    assert lengths == [5, 5, 5, 5, 4]
    with torch.inference_mode():
        expected = model.source(torch.tensor([prompt])).logits[0, -2:]
    assert found.rows == {22: 0, 23: 1}
    torch.testing.assert_close(found.logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("small_parts")
def test_a_rotation_that_depends_on_the_whole_length_isnt_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first parts, shorter than the boundary, would be rotated otherwise."""
    model = tiny_model(
        "llama",
        max_position_embeddings=24,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )
    assert model.capability.level == "tree"
    long, short = random_ids(30, seed=4), random_ids(24, seed=4)
    with torch.inference_mode():
        expected = model.source(torch.tensor([long])).logits[0, -1]
    lengths = lengths_read(model, monkeypatch)
    found = model.prefill(long, model.new_cache())
    assert lengths == [30]
    torch.testing.assert_close(found.logits[0], expected, rtol=1e-3, atol=1e-3)
    lengths.clear()
    model.prefill(short, model.new_cache())
    assert lengths == [5, 5, 5, 5, 4]


@pytest.mark.usefixtures("small_parts")
def test_a_cache_that_is_the_models_own_is_read_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("mamba")
    assert model.capability.level == "plain"
    lengths = lengths_read(model, monkeypatch)
    cache = PlainCache(None)
    model.prefill(random_ids(30), cache)
    assert lengths == [30]


@pytest.mark.usefixtures("small_parts")
def test_logits_that_nobody_asked_for_arent_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a model has no argument for that, parts bound how many there are."""
    model = tiny_model("llama")
    _ = model.capability
    expected = model.prefill(random_ids(12), model.new_cache(), last=3)
    model._takes_keep = False
    lengths = lengths_read(model, monkeypatch)
    found = model.prefill(random_ids(12), model.new_cache(), last=3)
    assert lengths == [5, 5, 2]
    assert found.rows == expected.rows
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_no_tensor_grows_with_the_square_of_the_prompt(architecture: str) -> None:
    count = 6000
    model = tiny_model(architecture, max_position_embeddings=2 * count)
    _ = model.capability
    prompt = random_ids(count)
    with Largest() as largest:
        model.prefill(prompt, model.new_cache(count))
    # A part's mask; the tiny model's own states are smaller.
    assert largest.elements <= models.PART_TOKENS * count


def test_room_for_tokens_is_made_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", max_position_embeddings=200_000)
    prompt = random_ids(20)
    cache = model.new_cache(20 + 100_000)
    monkeypatch.setattr(model, "new_cache", lambda capacity: cache)
    run = Run(Engine(model), Autoregressive(), prompt, Controls.greedy(100_000))
    steps = iter(run)
    for _ in range(5):
        next(steps)
    assert cache.rows[0].keys is not None
    assert cache.rows[0].keys.shape[2] < 1000


def test_a_long_prompts_rows_are_allocated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama", max_position_embeddings=9000)
    _ = model.capability
    monkeypatch.setattr(models, "PART_TOKENS", 100)
    cache = model.new_cache(3000)
    prompt = random_ids(2000)
    model.prefill(prompt[:1], cache)
    assert cache.rows[0].keys is not None
    assert cache.rows[0].keys.shape[2] < 300
    grown: list[int] = []
    grow = type(cache.rows[0])._grown

    def counting(layer: Any, buffer: torch.Tensor, rows: int) -> torch.Tensor:
        grown.append(rows)
        return grow(layer, buffer, rows)

    monkeypatch.setattr(type(cache.rows[0]), "_grown", counting)
    model.prefill(prompt[1:], cache)
    assert len(grown) == 2 * len(cache.rows)  # keys and values of each layer
    assert cache.rows[0].keys.shape[2] <= 1.25 * len(prompt)
