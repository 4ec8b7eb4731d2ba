"""What a model is found able to verify, held against its own ``generate``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import ModelLoadError, NoHiddenStatesError
from adaptspec.host import Host
from adaptspec.model import miniature
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import (
    SPREAD,
    VOCAB,
    hf_greedy,
    random_ids,
    tiny_model,
    tiny_module,
)
from adaptspec.testing.strategies import plain_strategy

HALVES = (torch.bfloat16, torch.float16)
NEO: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "initializer_range": SPREAD,
}
RWKV: dict[str, Any] = {
    "hidden_size": 32,
    "attention_hidden_size": 32,
    "num_hidden_layers": 2,
    "context_length": 64,
}
FREE = ("lookahead", "token_recycling", "hybrid", "prompt_lookup", "suffix")


def built(config: str, seed: int = 0, **arguments: Any) -> Any:
    """A random model of transformers' own, in float32."""
    nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    arguments = {"vocab_size": VOCAB, **nothing, **arguments}
    made = getattr(transformers, config)(**arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.AutoModelForCausalLM.from_config(made)  # type: ignore[no-untyped-call]
    return module.float().eval()


def test_a_callers_autocast_hides_nothing_that_a_model_can_verify() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        capability = tiny_model("llama").capability
        assert torch.is_autocast_enabled("cpu")
    assert capability.level == "tree"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("window", [16, 200])
def test_a_model_that_counts_rows_verifies_chains_in_every_precision(
    window: int, dtype: torch.dtype
) -> None:
    module = built("GPTNeoConfig", window_size=window, **NEO).to(dtype)
    capability = LanguageModel(module).capability
    assert capability.level == "chain"
    assert "trees fail" in capability.reason


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("architecture", "level"),
    [
        ("llama", "tree"),
        ("mistral", "tree"),
        ("gemma3", "tree"),
        ("gpt2", "tree"),
        ("mixtral", "tree"),
        ("bloom", "chain"),
        ("mamba", "plain"),
    ],
)
def test_half_precision_finds_what_float32_does(
    architecture: str, level: str, dtype: torch.dtype
) -> None:
    model = LanguageModel(tiny_module(architecture).to(dtype))
    assert model.capability.level == level


@pytest.mark.slow
@pytest.mark.parametrize("name", FREE)
def test_prompts_longer_than_a_window_of_rows_are_decoded_as_generate_does(
    name: str,
) -> None:
    module = built("GPTNeoConfig", window_size=64, max_position_embeddings=128, **NEO)
    model = LanguageModel(module)
    for seed in (1, 2):
        half = random_ids(35, seed=seed)
        prompt = [*half, *half]
        strategy = Host.installed().strategy(name)
        if strategy.unavailable(model, None):
            assert strategy.requires.trees
            return
        run = Engine(model).generate(strategy(), prompt, Controls.greedy(20))
        assert run.token_ids == hf_greedy(model, prompt, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("config", ["GPTNeoConfig", "GPT2Config", "OPTConfig"])
def test_no_row_is_run_past_the_last_position(config: str, name: str) -> None:
    arguments: dict[str, Any] = {
        "GPTNeoConfig": {**NEO, "window_size": 16, "max_position_embeddings": 40},
        "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
        "OPTConfig": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
        },
    }[config]
    model = LanguageModel(built(config, **arguments), shapes="fixed")
    strategy = Host.installed().strategy(name)
    if strategy.unavailable(model, None):
        return
    prompt = random_ids(10) * 3
    run = Engine(model).generate(strategy(), prompt, Controls.greedy(50))
    assert run.token_ids == hf_greedy(model, prompt, 10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_cache_is_swallowed_reads_its_text_anew(
    dtype: torch.dtype,
) -> None:
    module = built("RwkvConfig", **RWKV)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=SPREAD)
    model = LanguageModel(module.to(dtype))
    assert (model.capability.level, model.capability.uncached) == ("plain", True)
    for prompt in ([5, 9, 33, 7], random_ids(30)):
        run = Engine(model).generate(plain_strategy(), prompt, Controls.greedy(16))
        assert run.token_ids == hf_greedy(model, prompt, 16)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig", "ElectraConfig"])
def test_an_encoder_is_refused_by_name(config: str) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 1,
    }
    model = LanguageModel(built(config, **sizes))
    with pytest.raises(ModelLoadError, match=r"isn't a causal language model") as told:
        _ = model.capability
    assert "\n" not in str(told.value)
    model = LanguageModel(built(config, is_decoder=True, **sizes))
    prompt = random_ids(9)
    run = Engine(model).generate(plain_strategy(), prompt, Controls.greedy(8))
    assert run.token_ids == hf_greedy(model, prompt, 8)


def test_a_model_that_raises_is_refused_in_one_line() -> None:
    module = tiny_module("llama")

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("out of its\nown code")

    module.model.layers[1].forward = broken
    with pytest.raises(ModelLoadError, match=r"doesn't run: IndexError") as told:
        _ = LanguageModel(module).capability
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_fault_of_this_very_model_is_seen_though_its_class_is_fine() -> None:
    module = tiny_module("llama").to(torch.bfloat16)
    plain = module.model.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
            kwargs["position_ids"] = torch.zeros_like(kwargs["position_ids"])
            kwargs["attention_mask"] = None
        return plain(*args, **kwargs)

    module.model.forward = forgetful
    assert LanguageModel(copy.deepcopy(module)).capability.level != "tree"


class OneSize(transformers.LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A class that can be built at its own size only, as remote code may be."""

    def __init__(self, config: Any) -> None:
        if config.vocab_size != VOCAB + 6:
            raise ValueError("its own vocabulary")
        super().__init__(config)


def one_size(**lengths: Any) -> OneSize:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB + 6,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=SPREAD,
    )
    for name, length in lengths.items():
        setattr(config, name, length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OneSize(config)


def test_without_a_miniature_the_model_itself_is_looked_at() -> None:
    model = LanguageModel(one_size().bfloat16())
    assert miniature.build(model.model, model.config) is None
    assert model.capability.level == "tree"


def test_a_window_that_cant_be_crossed_is_not_believed_in() -> None:
    model = LanguageModel(
        one_size(local_window_size=5000, max_position_embeddings=9000)
    )
    assert model.capability.level == "plain"
    assert "local_window_size of 5000" in model.capability.reason


def test_a_miniature_keeps_the_kinds_of_layers_and_shortens_their_windows() -> None:
    config = transformers.Gemma3TextConfig(
        sliding_window=4096,
        num_hidden_layers=12,
        layer_types=["sliding_attention"] * 5
        + ["full_attention"]
        + ["sliding_attention"] * 6,
        hidden_size=640,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        vocab_size=300,
    )
    with torch.device("meta"):
        real = transformers.Gemma3ForCausalLM(config)
    small: Any = miniature.build(real, config)
    assert small.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert small.config.sliding_window < 32
    assert sum(p.numel() for p in small.parameters()) < 5e6
    assert config.sliding_window == 4096


def test_texts_read_as_a_batch_get_the_logits_of_the_callers_model() -> None:
    module = tiny_module("gemma3")
    ids = torch.tensor([random_ids(20, seed=1), random_ids(20, seed=2)])
    with torch.inference_mode():
        ours, theirs = (
            m(input_ids=ids).logits for m in (LanguageModel(module).model, module)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_model_that_shows_no_states_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    forward = model.model.forward

    def silent(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        output.hidden_states = None
        return output

    monkeypatch.setattr(model.model, "forward", silent)
    cache = model.new_cache()
    with pytest.raises(NoHiddenStatesError, match="llama shows no hidden states"):
        model.prefill([2, 3], cache, hidden_layers=(1,))
    assert len(model.prefill([4], cache).rows) == 1
