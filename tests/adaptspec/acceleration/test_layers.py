"""Decoder layers as one operation: which are, what they give, when they stop."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from adaptspec.acceleration import native
from adaptspec.acceleration.decoder_layer import Norm, WholeLayer
from adaptspec.acceleration.layers import _norm, _parts
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import random_ids, tiny_module
from adaptspec.token_tree import TokenTree
from kernels import needs_compiler

pytestmark = needs_compiler

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mistral")
DTYPES = (torch.bfloat16, torch.float32)
PROMPT = random_ids(20)
TREE = TokenTree([5, 6, 7, 8, 9, 10], [-1, 0, 0, 1, 2, 4])
# Numbers of logits apart, relative to the largest, that rounding in a layer explains.
ALLOWED = {torch.bfloat16: 0.05, torch.float32: 1e-5}


def whole_layers(model: LanguageModel) -> list[tuple[nn.Module, WholeLayer]]:
    return [
        (module, whole)
        for module in model.model.modules()
        if isinstance(whole := module.__dict__.get("whole"), WholeLayer)
    ]


def logits_of(model: LanguageModel, tree: TokenTree = TREE) -> torch.Tensor:
    cache = model.new_cache()
    model.prefill(PROMPT, cache)
    return model.forward_tree(tree, cache).logits.float()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def changed(family: str, change: Callable[[Any], None], **arguments: Any) -> Any:
    """A tiny model, each of whose decoder layers was changed before it is loaded."""
    module = tiny_module(family, **arguments)
    for layer in module.model.layers:
        change(layer)
    return module


@pytest.mark.parametrize("own_weights", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_gives_what_its_modules_give(
    family: str, dtype: torch.dtype, own_weights: bool
) -> None:
    module = tiny_module(family).to(dtype)
    expected = logits_of(LanguageModel(copy.deepcopy(module), accelerate=False))
    model = LanguageModel(module, own_weights=own_weights)
    if dtype is torch.bfloat16 and native.kernel().tiles:
        assert model.fused == 0  # matrix units have products of their own
        return
    assert model.fused == len(whole_layers(model)) == module.config.num_hidden_layers
    assert apart(logits_of(model), expected) < ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_its_layers_a_model_gives_the_same(dtype: torch.dtype) -> None:
    model = LanguageModel(tiny_module("qwen3").to(dtype), own_weights=True)
    found = logits_of(model)
    for module, _ in whole_layers(model):
        module.__dict__["whole"] = None
    assert apart(found, logits_of(model)) < ALLOWED[dtype] / 5


def test_a_caller_s_module_keeps_its_class_and_forward() -> None:
    module = tiny_module("llama")
    kinds = [type(x) for x in module.modules()]
    model = LanguageModel(module)
    assert model.fused == 2
    assert [type(x) for x in module.modules()] == kinds
    (first, _), _ = whole_layers(model)
    assert isinstance(first, type(module.model.layers[0]))


def residual_scaled(layer: Any) -> None:
    inner = layer.mlp.forward
    layer.mlp.forward = lambda x: 0.9 * inner(x)


def limited(layer: Any) -> None:
    """Keys have a limit that text hardly ever reaches (as OLMo's clip_qkv)."""

    class Limited(type(layer.self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            most = float(self.k_proj(hidden_states).abs().max())
            scale = min(1.0, 10.0 / most)
            return super().forward(hidden_states * scale, **kwargs)

    layer.self_attn.__class__ = Limited


class LayerNorm(nn.Module):
    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size) + 0.5), 1e-6
        self.bias = nn.Parameter(torch.rand(size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.weight.shape
        return functional.layer_norm(x, shape, self.weight, self.bias, 1e-6)


def centred(layer: Any) -> None:
    layer.input_layernorm = LayerNorm(32, bias=False)


def centred_and_moved(layer: Any) -> None:
    layer.post_attention_layernorm = LayerNorm(32, bias=True)


def parallel(layer: Any) -> None:
    """Attention and MLP read the same, as in GPT-J."""

    class Parallel(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            read = self.input_layernorm(hidden_states)
            attended, _ = self.self_attn(hidden_states=read, **kwargs)
            sum_: torch.Tensor = hidden_states + attended + self.mlp(read)
            return sum_

    layer.__class__ = Parallel


def far_scaled(layer: Any) -> None:
    """Queries grow with their position, from some position on (Ministral 3)."""

    class Far(type(layer.self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            self.scaling = self.head_dim**-0.5
            if int(kwargs["position_ids"].max()) > 100:
                self.scaling *= 1.1
            return super().forward(hidden_states, **kwargs)

    layer.self_attn.__class__ = Far


def biased(layer: Any) -> None:
    """Attention is asked for more than products, which needn't show in a few tokens."""

    class Biased(type(layer.self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            bias = hidden_states.new_zeros(1, 1, 1, 1)
            return super().forward(hidden_states, position_bias=bias, **kwargs)

    layer.self_attn.__class__ = Biased


def activated_otherwise(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


def with_more(layer: Any) -> None:
    layer.extra = nn.Linear(32, 32)


def patched(layer: Any) -> None:
    layer.mlp.forward = layer.mlp.forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "change",
    [
        *(residual_scaled, limited, centred, centred_and_moved, parallel, far_scaled),
        *(biased, activated_otherwise, with_more, patched),
    ],
)
def test_layers_that_compute_something_else_are_left_alone(
    change: Callable[[Any], None], dtype: torch.dtype
) -> None:
    module = changed("llama", change).to(dtype)
    kinds = [type(layer) for layer in module.model.layers]
    model = LanguageModel(module, own_weights=True)
    assert model.fused == 0
    assert [type(layer) for layer in module.model.layers] == kinds
    assert not any("whole" in x.__dict__ for x in module.modules())


def unturned(layer: Any) -> None:
    """No rotary embedding, as in every fourth layer of SmolLM3."""

    class Unturned(type(layer.self_attn)):  # type: ignore[misc]
        def forward(
            self, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any
        ) -> Any:
            cos, sin = position_embeddings
            still = torch.ones_like(cos), torch.zeros_like(sin)
            return super().forward(hidden_states, position_embeddings=still, **kwargs)

    layer.self_attn.__class__ = Unturned


def gelu(layer: Any) -> None:
    layer.mlp.act_fn = nn.GELU(approximate="tanh")


def swapped(layer: Any) -> None:
    """The activation acts on what is called up."""

    class Swapped(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            acted = functional.silu(self.up_proj(x))
            down: torch.Tensor = self.down_proj(acted * self.gate_proj(x))
            return down

    layer.mlp.__class__ = Swapped


def normed_behind(layer: Any) -> None:
    """Outputs are normalised, as in OLMo 2."""

    class Behind(type(layer)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
            hidden_states = hidden_states + self.input_layernorm(attended)
            made = self.post_attention_layernorm(self.mlp(hidden_states))
            sum_: torch.Tensor = hidden_states + made
            return sum_

    layer.__class__ = Behind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [unturned, gelu, swapped, normed_behind])
def test_other_ways_to_put_a_layer_together_are_recognised(
    change: Callable[[Any], None], dtype: torch.dtype
) -> None:
    if dtype is torch.bfloat16 and native.kernel().tiles:
        pytest.skip("matrix units have products of their own")
    module = changed("llama", change).to(dtype)
    expected = logits_of(LanguageModel(copy.deepcopy(module), accelerate=False))
    model = LanguageModel(module, own_weights=True)
    assert model.fused == 2
    assert apart(logits_of(model), expected) < ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "own",
    [nn.SiLU(), nn.GELU(approximate="tanh"), nn.GELU()],
    ids=["silu", "tanh", "erf"],
)
def test_two_activations_that_rounding_hides_are_told_apart(
    own: nn.Module, dtype: torch.dtype
) -> None:
    if dtype is torch.bfloat16 and native.kernel().tiles:
        pytest.skip("matrix units have products of their own")

    def change(layer: Any) -> None:
        layer.mlp.act_fn = own
        # Where the two ways to compute GELU are furthest apart.
        layer.mlp.gate_proj.weight.data *= 2 / layer.mlp.gate_proj.weight.data.std()
        layer.mlp.up_proj.weight.data *= 1 / layer.mlp.up_proj.weight.data.std()

    module: Any = changed("llama", change).to(dtype)
    assert LanguageModel(module, own_weights=True).fused == 2
    layers = module.model.layers
    found = [layer.__dict__["whole"].recipe.activation for layer in layers]
    wanted = 0 if isinstance(own, nn.SiLU) else 2 - (own.approximate == "tanh")
    assert found == [wanted, wanted]


def model_of(dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(tiny_module("llama").to(dtype), own_weights=True)


def test_a_hook_on_an_inner_module_sees_its_calls() -> None:
    model = model_of()
    seen: list[torch.Tensor] = []
    (layer, _), _ = whole_layers(model)
    handle = layer.mlp.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: seen.append(output)
    )
    expected = logits_of(model)
    seen.clear()
    assert apart(logits_of(model), expected) < 1e-5
    assert seen[-1].shape[1] == len(TREE)
    handle.remove()
    seen.clear()
    logits_of(model)
    assert all(output.shape[1] != len(TREE) for output in seen)


def test_a_hook_on_the_layer_sees_what_it_gives() -> None:
    model = model_of()
    seen: list[torch.Tensor] = []
    for layer, _ in whole_layers(model):
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    cache = model.new_cache()
    model.prefill(PROMPT, cache)
    seen.clear()
    forward = model.forward_tree(TREE, cache, hidden_layers=(1, 2))
    assert torch.equal(forward.hidden[1], seen[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_are_those_of_the_modules_before_and_after_they_are_asked_for(
    dtype: torch.dtype,
) -> None:
    model = model_of(dtype)
    plain = LanguageModel(tiny_module("llama").to(dtype), accelerate=False)
    found = []
    for each in (model, plain, model):
        cache = each.new_cache()
        each.prefill(PROMPT, cache)
        found.append(each.forward_tree(TREE, cache, hidden_layers=(0, 1, 2)).hidden)
    for layer in (0, 1, 2):
        assert torch.equal(found[0][layer], found[2][layer])
        assert apart(found[0][layer].float(), found[1][layer].float()) < ALLOWED[dtype]
    # transformers' own hooks on inner modules, which stay, don't end it.
    calls = count_calls(model)
    logits_of(model)
    assert calls[-1] is not None


def count_calls(model: LanguageModel) -> list[Any]:
    """What whole layers give from now on; None where modules run."""
    given: list[Any] = []

    class Counting:
        def __init__(self, whole: WholeLayer) -> None:
            self.whole = whole

        def __call__(self, args: Any, kwargs: Any) -> Any:
            given.append(self.whole(args, kwargs))
            return given[-1]

    for module, whole in whole_layers(model):
        module.__dict__["whole"] = Counting(whole)
    return given


def norm_doubled(layer: Any) -> None:
    with torch.no_grad():
        layer.input_layernorm.weight *= 2


def norm_replaced(layer: Any) -> None:
    layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight * 2)


def module_replaced(layer: Any) -> None:
    layer.mlp.down_proj = nn.Linear(64, 32, bias=False)


def weight_read(layer: Any) -> None:
    with torch.no_grad():
        layer.mlp.down_proj.weight *= 2


def forward_replaced(layer: Any) -> None:
    layer.mlp.forward = torch.zeros_like


@pytest.mark.parametrize(
    "change",
    [norm_doubled, norm_replaced, module_replaced, weight_read, forward_replaced],
)
def test_what_is_changed_after_loading_counts(change: Callable[[Any], None]) -> None:
    module = tiny_module("llama")
    torch.manual_seed(0)
    model = LanguageModel(module, own_weights=True)
    before = logits_of(model)
    change(module.model.layers[1])
    found = logits_of(model)
    expected = logits_of(LanguageModel(copy.deepcopy(module), accelerate=False))
    assert apart(found, expected) < 1e-5
    assert apart(before, expected) > 1e-2


def test_a_copy_of_the_model_runs_its_modules() -> None:
    model = model_of()
    expected = logits_of(model)
    twin = LanguageModel(copy.deepcopy(model.model), own_weights=True, accelerate=False)
    assert not whole_layers(twin)
    assert apart(logits_of(twin), expected) < 1e-5


@pytest.mark.parametrize("own_weights", [True, False])
def test_a_model_is_taken_over_a_second_time(own_weights: bool) -> None:
    model = model_of()
    again = LanguageModel(model.model, own_weights=own_weights)
    assert again.fused == len(whole_layers(again)) == 2
    assert apart(logits_of(again), logits_of(model)) < 1e-5


def test_gradients_flow_through_a_caller_s_layers() -> None:
    module = tiny_module("llama")
    model = LanguageModel(module)
    logits_of(model)
    model.model(input_ids=torch.tensor([PROMPT])).logits.sum().backward()
    assert module.model.layers[0].mlp.down_proj.weight.grad is not None


class Rms(nn.Module):
    """With what is added to the weight, and where it rounds."""

    def __init__(self, size: int, epsilon: float, offset: float, early: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))
        self.eps, self.offset, self.early = epsilon, int(offset), early

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        weight = self.weight.float() + self.offset
        if self.early:
            return y.to(x.dtype) * weight.to(x.dtype)
        return (y * weight).to(x.dtype)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1e-3])
@pytest.mark.parametrize("way", [(0.0, True), (0.0, False), (1.0, False)])
def test_a_norm_is_recognised_by_what_it_gives(
    way: tuple[float, bool], epsilon: float
) -> None:
    offset, early = way
    module = Rms(96, epsilon, offset, early).to(torch.bfloat16)
    assert _norm(module) == Norm(module, epsilon, offset, early)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [96, 4096])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_is_none(bias: bool, size: int, dtype: torch.dtype) -> None:
    """Also where rounding hides what the mean of many random numbers is."""
    assert _norm(LayerNorm(size, bias).to(dtype)) is None


def test_experts_are_left_alone() -> None:
    model = LanguageModel(tiny_module("mixtral"), own_weights=True)
    assert model.fused == 0
    assert all(_parts(module) is None for module in model.model.modules())


OLDER = """
import sys, torch
from adaptspec.acceleration import native
native.FLAGS = tuple(
    "-march=" + sys.argv[1] if flag.startswith("-march") else flag
    for flag in native.FLAGS
)
import test_layers as tests
for family in tests.FAMILIES:
    for dtype in tests.DTYPES:
        for own_weights in (True, False):
            tests.test_a_layer_gives_what_its_modules_give(family, dtype, own_weights)
from adaptspec.acceleration.native import kernel
print(kernel().lanes, kernel().pairs)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiled for x86-64")
@pytest.mark.parametrize(
    ("processor", "told"),
    [("x86-64", "4 False"), ("x86-64-v3", "8 False"), ("x86-64-v4", "16 False")],
)
def test_older_processors_give_the_same(
    processor: str, told: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path))
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", OLDER, processor], capture_output=True, text=True
    )
    assert done.returncode in (0, -4), done.stderr  # the latter: no such instructions
    if done.returncode == 0:
        assert done.stdout.strip().endswith(told)
