"""An environment's key holds everything that decides speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptspec.environment import environment_of
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.profile import HOLDS
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer


def of(module: Any) -> tuple[object, ...]:
    return environment_of(LanguageModel(module), None).key()


def test_equal_models_have_one_key_wherever_they_come_from(tmp_path: Path) -> None:
    module = tiny_module("llama")
    here = of(module)
    module.save_pretrained(tmp_path)
    module.config._name_or_path = "somewhere/else"
    assert of(module) == here
    # Weights of ours may be packed and attended to otherwise than a caller's.
    loaded = environment_of(load_model(tmp_path, tokenizer=tiny_tokenizer()), None)
    known = environment_of(LanguageModel(module), None)
    assert set(loaded.differences(known, HOLDS)) <= {"kernel", "attention"}


def eps(module: Any) -> None:
    module.config.rms_norm_eps = 0.5


def room(module: Any) -> None:
    module.config.max_position_embeddings = 77


def buffer(module: Any) -> None:
    module.model.rotary_emb.inv_freq.mul_(2.0)


def weights(module: Any) -> None:
    with torch.no_grad():
        module.lm_head.weight.mul_(2.0)


def attention(module: Any) -> None:
    module.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [eps, room, buffer, weights, attention])
def test_what_decides_outputs_or_speed_changes_the_key(change: Any) -> None:
    module = tiny_module("llama")
    before = of(module)
    change(module)
    assert of(module) != before


def test_the_kernel_and_its_packing_are_told() -> None:
    model = LanguageModel(tiny_module("llama"))
    model.linear = replace(model.linear, kind="packed float32: 1 rows 0.50x of torch's")
    environment = environment_of(model, None)
    assert environment.kernel == "packed float32"
    other = replace(environment, kernel="native float32")
    assert environment.key() != other.key()
    assert environment.differences(other, HOLDS) == ["kernel"]
    unknown = replace(environment, kernel=None)
    assert environment.differences(unknown, HOLDS) == []


def test_what_was_measured_in_fixed_shapes_is_told_apart() -> None:
    module = tiny_module("llama")
    kernels = {
        environment_of(LanguageModel(module, shapes=shapes), None).kernel
        for shapes in ("auto", "dynamic", "fixed")
    }
    plain = environment_of(LanguageModel(module), None).kernel
    assert kernels == {plain, f"{plain}, fixed"}
