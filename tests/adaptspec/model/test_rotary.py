"""Texts that cross a length at which a rotary scaling changes, against ``generate``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.rotary import context_length
from adaptspec.testing.fakes import SPREAD, VOCAB, hf_greedy, random_ids
from adaptspec.testing.strategies import plain_strategy

BOUNDARY, NEW_TOKENS = 32, 12
LENGTHS = (28, 31, 32, 33, 40)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": SPREAD,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 8.0, 6.0],
}
THETA = {"rope_theta": 1e4}
# What is given beside SIZES: the configuration's class, and its arguments.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": (
        "Phi3Config",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": BOUNDARY,
            "rope_parameters": LONG,
        },
    ),
    "phi3 with a window": (
        "Phi3Config",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": BOUNDARY,
            "rope_parameters": LONG,
            "sliding_window": 20,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": BOUNDARY,
            "num_local_experts": 4,
            "rope_parameters": {
                **LONG,
                "original_max_position_embeddings": BOUNDARY,
                "short_mscale": 1.1,
                "long_mscale": 1.3,
            },
        },
    ),
    "llama, long": (
        "LlamaConfig",
        {
            "max_position_embeddings": 128,
            "rope_parameters": {
                **LONG,
                "original_max_position_embeddings": BOUNDARY,
                "factor": 4.0,
            },
        },
    ),
    "llama, dynamic": (
        "LlamaConfig",
        {
            "max_position_embeddings": BOUNDARY,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA},
        },
    ),
    "llama, linear": (
        "LlamaConfig",
        {
            "max_position_embeddings": BOUNDARY,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA},
        },
    ),
    "qwen2, yarn": (
        "Qwen2Config",
        {
            "max_position_embeddings": BOUNDARY,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": BOUNDARY,
                **THETA,
            },
        },
    ),
}
STRATEGIES = (
    "autoregressive",
    "draft_model",
    "hybrid",
    "lookahead",
    "prompt_lookup",
    "token_recycling",
)


def module_of(case: str, seed: int = 0) -> Any:
    """A random model; a new one each time, since rotations remember lengths."""
    name, arguments = CASES[case]
    config = getattr(transformers, name)(**SIZES, **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return module.float().eval()


@functools.cache
def models(case: str) -> tuple[LanguageModel, LanguageModel]:
    """Target and draft model."""
    return LanguageModel(module_of(case)), LanguageModel(module_of(case, seed=1))


@functools.cache
def reference(case: str, length: int) -> list[int]:
    """What ``generate`` of a model that has read nothing before emits."""
    fresh = LanguageModel(module_of(case), accelerate=False)
    return hf_greedy(fresh, random_ids(length, seed=length), NEW_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_texts_across_a_switch_are_generates(case: str, name: str) -> None:
    target, draft = models(case)
    assert target.capability.level == "tree"
    for length in LENGTHS:
        run = Engine(target, draft).generate(
            Host.installed().strategy(name)(),
            random_ids(length, seed=length),
            Controls.greedy(NEW_TOKENS),
        )
        assert run.token_ids == reference(case, length)


@pytest.mark.parametrize("case", [case for case in CASES if "phi3" in case])
def test_decoding_leaves_a_model_as_it_was(case: str) -> None:
    """These write frequencies into a buffer in every pass."""
    module = module_of(case)
    prompt = random_ids(9)
    ids = torch.tensor([prompt])
    expected = module.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    lent, own = LanguageModel(module), LanguageModel(module_of(case), own_weights=True)
    for model in (lent, own):
        for _ in range(2):
            Engine(model).generate(plain_strategy(), prompt, Controls.greedy(4))
            assert not model.follow()
        source: Any = model.source
        found = source.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(found, expected)


def test_two_texts_in_turn_dont_share_a_rotation_that_grows() -> None:
    target = models("llama, dynamic")[0]
    runs = [
        Engine(target).stream(
            plain_strategy(),
            random_ids(length, seed=length),
            Controls.greedy(NEW_TOKENS),
        )
        for length in (40, 33)
    ]
    pairs = list(zip(*runs, strict=True))
    assert [a for a, _ in pairs] == reference("llama, dynamic", 40)
    assert [b for _, b in pairs] == reference("llama, dynamic", 33)


@pytest.mark.parametrize("case", ["phi3", "phimoe"])
def test_the_text_is_read_again_where_generate_does(case: str) -> None:
    assert models(case)[0].rereads == {BOUNDARY}


def test_no_text_is_read_again_where_generate_keeps_its_cache() -> None:
    for case in ("llama, long", "llama, dynamic", "qwen2, yarn"):
        assert models(case)[0].rereads == frozenset()


@pytest.mark.parametrize(
    ("case", "length"),
    [
        ("phi3", 128),
        ("llama, long", 128),
        ("llama, dynamic", 64),
        ("llama, linear", 128),
        ("qwen2, yarn", 128),
    ],
)
def test_a_scaling_counts_in_the_longest_text(case: str, length: int) -> None:
    assert models(case)[0].max_length == length


def test_published_scalings_give_the_lengths_their_models_are_known_for() -> None:
    def length(config: str, longest: int, **rope: Any) -> int | None:
        made = getattr(transformers, config)
        return context_length(made(max_position_embeddings=longest, rope_scaling=rope))

    before = "original_max_position_embeddings"
    yarn = {"rope_type": "yarn", "factor": 4.0, before: 32768}
    assert length("Qwen2Config", 32768, **yarn) == 131072
    yarn = {"type": "yarn", "factor": 40.0, before: 4096}
    assert length("DeepseekV3Config", 163840, **yarn) == 163840
    llama = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, before: 8192}
    scaled = length("LlamaConfig", 131072, rope_type="llama3", factor=8.0, **llama)
    assert scaled == 131072
    assert context_length(transformers.GPT2Config(n_positions=77)) == 77
    assert context_length(transformers.MambaConfig()) is None
