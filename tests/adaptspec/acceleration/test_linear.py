"""Replaced Linear layers against exact products, and what they leave alone."""

from __future__ import annotations

import copy
import hashlib
import math
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from adaptspec import cache_folder, default_model
from adaptspec.acceleration import linear as subject
from adaptspec.acceleration import native
from adaptspec.acceleration.argmax import argmax_rows
from adaptspec.acceleration.linear import ProductChoice, accelerate_linears
from adaptspec.acceleration.packed import (
    LARGE_PAGE_BYTES,
    SLAB_BYTES,
    PackedEmbedding,
    PackedLinear,
    PackedWeight,
    Slabs,
)
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import ModelLoadError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.testing.fakes import (
    VOCAB,
    hf_greedy,
    random_ids,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec.token_tree import TokenTree
from kernels import available, needs_compiler

Choose = Callable[[str], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Make the measured choice come out as told."""

    def choose(kind: str) -> None:
        choice = ProductChoice(cast(Any, kind), 1 << 30, "chosen by the test")
        monkeypatch.setattr(subject, "choose", lambda *_: choice)

    return choose


Multiply = Callable[
    [native.Kernel, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]


def as_it_lies(
    kernel: native.Kernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return kernel.linear(x, weight, bias)


def packed(
    kernel: native.Kernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    room = torch.empty(kernel.packed_size(weight), dtype=weight.dtype)
    held = kernel.pack(weight, room)
    assert torch.equal(kernel.unpack(held, weight.shape), weight)
    return kernel.packed_linear(x, held, weight.shape[0], bias)


multiplications = pytest.mark.parametrize("multiply", [as_it_lies, packed])


@needs_compiler
@multiplications
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.one_of(st.integers(1, 150), st.integers(500, 1100)),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.booleans(),
)
def test_the_kernel_equals_the_exact_product_rounded_once(
    multiply: Multiply,
    rows: int,
    inner: int,
    outer: int,
    bias: bool,
    dtype: torch.dtype,
    strided: bool,
) -> None:
    generator = torch.Generator().manual_seed(rows * inner * outer)
    wide = torch.randn(rows, inner * 2, generator=generator).to(dtype)
    x = wide[:, ::2] if strided else wide[:, :inner]
    weight = torch.randn(outer, inner, generator=generator).to(dtype)
    added = torch.randn(outer, generator=generator).to(dtype) if bias else None
    exact = x.double() @ weight.double().T
    if added is not None:
        exact = exact + added.double()
    sizes = x.double().abs() @ weight.double().abs().T + 1
    found = multiply(native.kernel(), x.contiguous(), weight, added)
    # inner additions in float, and half a unit of the output's last place
    bound = sizes * inner * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= bound + 1e-30).all()


@needs_compiler
@multiplications
@pytest.mark.parametrize("inner", [197, 1205])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_the_same_bits_whatever_rows_are_beside_it(
    dtype: torch.dtype, inner: int, multiply: Multiply
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(53, inner).to(dtype)
    x = torch.randn(70, inner).to(dtype)
    kernel = native.kernel()
    alone = torch.cat([multiply(kernel, row[None], weight, None) for row in x])
    for rows in range(1, 71):
        assert torch.equal(multiply(kernel, x[:rows], weight, None), alone[:rows])


@pytest.mark.slow
@needs_compiler
@multiplications
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 builds")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("machine", "lanes", "needed"),
    [
        ("skylake-avx512", 16, {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("haswell", 8, {"avx2", "fma"}),
        ("x86-64", 4, set()),
    ],
)
def test_builds_without_matrix_units_or_with_narrower_registers_compute_the_same(
    machine: str,
    lanes: int,
    needed: set[str],
    dtype: torch.dtype,
    multiply: Multiply,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not needed <= set(native._cpu_flags().split()):
        pytest.skip(f"this processor hasn't all of {', '.join(sorted(needed))}")
    flags = [f for f in native.FLAGS if not f.startswith("-march")]
    monkeypatch.setattr(native, "FLAGS", (*flags, f"-march={machine}"))
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path))
    built = native.load_kernel()
    assert (built.lanes, built.columns) == (lanes, {16: 32, 8: 32, 4: 16}[lanes])
    assert not built.tiles
    assert not built.pairs
    torch.manual_seed(0)
    weight, x = torch.randn(37, 611).to(dtype), torch.randn(9, 611).to(dtype)
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    found = multiply(built, x, weight, None)
    bound = sizes * 611 * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= bound).all()
    assert torch.equal(multiply(built, x[3:4], weight, None), found[3:4])


@pytest.mark.skipif(not available() or not native.kernel().tiles, reason="no AMX here")
def test_without_leave_to_use_tiles_the_kernel_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    weight, x = (torch.randn(n, 611).to(torch.bfloat16) for n in (37, 40))
    on_tiles = native.kernel().linear(x, weight, None)
    refused = native.load_kernel()
    refused.tiles = False
    monkeypatch.delattr(refused, "_on_tiles")
    without = refused.linear(x, weight, None)
    # two roundings of nearly the same sum: a unit of the last place apart at most
    torch.testing.assert_close(on_tiles, without, rtol=2.0**-7, atol=1e-4)


@needs_compiler
@multiplications
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_reach_their_rows_only(
    dtype: torch.dtype, multiply: Multiply
) -> None:
    x = torch.ones(3, 37, dtype=dtype)
    x[0, 36], x[1, 3] = math.nan, math.inf
    found = multiply(native.kernel(), x, torch.ones(5, 37, dtype=dtype), None)
    assert found[0].isnan().all()
    assert (found[1] == math.inf).all()
    assert (found[2] == 37).all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(self.embedding(ids)))
        return out


def parameter_bytes(model: nn.Module) -> int:
    seen = {p.data_ptr(): p.nbytes for p in model.parameters()}
    held = {
        id(m.packed): m.packed.nbytes
        for m in model.modules()
        if isinstance(m, PackedLinear | PackedEmbedding) and m.packed is not None
    }
    return sum(seen.values()) + sum(held.values())


@needs_compiler
@pytest.mark.parametrize("kind", ["native", "packed"])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replaced_model_computes_the_same_and_holds_no_weight_twice(
    kind: str, rows: int, dtype: torch.dtype, choose: Choose
) -> None:
    torch.manual_seed(1)
    model = Tied().to(dtype)
    ids = torch.arange(rows) % 32
    before, size = model(ids).detach(), parameter_bytes(model)
    choose(kind)
    report = accelerate_linears(model, own_weights=True)
    with torch.inference_mode():
        after = model(ids)
    assert report.replaced == 2
    assert parameter_bytes(model) == size
    assert model.head.weight is model.embedding.weight
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)
    assert parameter_bytes(model) == size


READS: dict[str, Callable[[nn.Linear], Any]] = {
    "weight": lambda layer: layer.weight,
    "state": lambda layer: layer.state_dict()["weight"],
    "function": lambda layer: functional.linear(torch.eye(6), layer.weight).T,
    "moved": lambda layer: layer.to("cpu").weight,
    "parameters": lambda layer: dict(layer.double().named_parameters())["weight"],
}


def pack_layer(linear: nn.Linear) -> PackedLinear:
    kernel = native.kernel()
    return PackedLinear(linear, PackedWeight(linear.weight, kernel, Slabs(kernel)), 64)


@needs_compiler
@pytest.mark.parametrize("how", READS)
def test_whoever_reads_a_packed_weight_gets_it_and_it_is_held_once(how: str) -> None:
    linear = nn.Linear(6, 10)
    kept, bias = linear.weight.detach().clone(), linear.bias
    x = torch.randn(3, 6)
    wanted = linear(x).detach()
    layer = pack_layer(linear)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is bias
    assert "weight" not in layer._parameters
    with torch.inference_mode():
        read = READS[how](layer)
    torch.testing.assert_close(read.to(kept.dtype), kept, rtol=0, atol=0)
    assert layer.packed is None
    found = layer(x.to(layer.weight.dtype)).detach()
    torch.testing.assert_close(found.float(), wanted)


@needs_compiler
def test_a_copy_of_packed_layers_is_plain_and_leaves_them_packed(
    choose: Choose,
) -> None:
    choose("packed")
    model = Tied()
    ids = torch.arange(9)
    with torch.inference_mode():
        accelerate_linears(model, own_weights=True)
        wanted = model(ids)
        twin = copy.deepcopy(model)
        assert twin.head.weight is twin.embedding.weight
        torch.testing.assert_close(twin(ids), wanted)
        twin.float()
        assert isinstance(model.head, PackedLinear)
        assert model.head.packed is not None
        assert torch.equal(model(ids), wanted)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_unpacked_layer_keeps_the_bits_of_a_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = pack_layer(nn.Linear(197, 53).to(dtype))
    layer.unpack()
    x = torch.randn(9, 197).to(dtype)
    with torch.inference_mode():
        alone = torch.cat([layer(row[None]) for row in x])
        assert torch.equal(layer(x), alone)


@needs_compiler
def test_no_rows_leave_a_layer_packed() -> None:
    layer = pack_layer(nn.Linear(8, 4))
    with torch.inference_mode():
        assert layer(torch.empty(2, 0, 8)).shape == (2, 0, 4)
    assert layer.packed is not None


@needs_compiler
def test_a_bias_is_trained_if_it_wants_to_be() -> None:
    linear = nn.Linear(8, 4)
    linear.weight.requires_grad_(False)
    layer = pack_layer(linear)
    layer(torch.ones(2, 8)).sum().backward()
    assert layer.bias.grad is not None


@needs_compiler
def test_layers_named_arguments_are_torchs() -> None:
    layer, embedding = pack_layer(nn.Linear(8, 4)), Tied()
    accelerate_linears(embedding, own_weights=True)
    with torch.inference_mode():
        assert layer(input=torch.ones(1, 8)).shape == (1, 4)
        assert embedding.embedding(input=torch.tensor([1])).shape == (1, 32)


@needs_compiler
def test_kernels_write_to_the_cpu_whatever_the_default_device() -> None:
    weight, x = torch.randn(5, 8), torch.randn(2, 8)
    query = torch.randn(2, 3, 8)
    mask = torch.zeros(3, 3)
    kernel = native.kernel()
    with torch.device("meta"):
        for multiply in (as_it_lies, packed_of):
            assert multiply(kernel, x, weight, None).device.type == "cpu"
        seen = kernel.seen(mask)
        assert kernel.attend(query, query, query, seen, 1.0).device.type == "cpu"
        assert kernel.largest(x, 2).device.type == "cpu"


def packed_of(
    kernel: native.Kernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    held = PackedWeight(weight, kernel, Slabs(kernel))
    found = held.product(x, bias)
    assert found is not None
    return found


@needs_compiler
def test_a_layer_whose_type_was_changed_is_torchs(choose: Choose) -> None:
    choose("native")
    model = nn.Sequential(nn.Linear(8, 8))
    accelerate_linears(model, own_weights=False)
    model.double()
    assert model(torch.ones(1, 8, dtype=torch.float64)).dtype is torch.float64


def test_a_kernel_that_is_missing_is_looked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def load() -> native.Kernel:
        asked.append(1)
        raise native.NativeUnavailableError("none")

    monkeypatch.setattr(native, "load_kernel", load)
    native._found.cache_clear()
    try:
        for _ in range(3):
            with pytest.raises(native.NativeUnavailableError, match="none"):
                native.kernel()
        assert len(asked) == 1
    finally:
        native._found.cache_clear()


@needs_compiler
def test_layers_that_share_a_packed_weight_share_it_unpacked(choose: Choose) -> None:
    choose("packed")
    model = Tied()
    kept, ids = model.head.weight.detach().clone(), torch.tensor([[3, 31], [0, 7]])
    wanted = model(ids).detach()
    accelerate_linears(model, own_weights=True)
    embedding, head = model.embedding, model.head
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert embedding.packed is head.packed is not None
    with torch.inference_mode():
        assert torch.equal(embedding(ids), kept[ids])
        for outside in (-1, 32):
            with pytest.raises(IndexError):
                embedding(torch.tensor([0, outside]))
    assert torch.equal(embedding.weight, kept)
    assert embedding.packed is head.packed is None
    assert head.weight is embedding.weight
    torch.testing.assert_close(model(ids).detach(), wanted)


def scaled(embedding: nn.Embedding) -> None:
    embedding.register_forward_hook(lambda *args: args[2] * 2)


def limited(embedding: nn.Embedding) -> None:
    embedding.max_norm = 1.0


@needs_compiler
@pytest.mark.parametrize("change", [scaled, limited])
def test_a_weight_that_another_kind_of_layer_reads_stays_plain(
    change: Callable[[nn.Embedding], None], choose: Choose
) -> None:
    choose("packed")
    model = Tied()
    change(model.embedding)
    kept = model.embedding
    ids = torch.arange(5)
    with torch.inference_mode():
        wanted = model(ids)
        assert accelerate_linears(model, own_weights=True).replaced == 2
        assert model.embedding is kept
        assert isinstance(model.head, subject.NativeLinear)
        assert isinstance(model.inner, PackedLinear)
        torch.testing.assert_close(model(ids), wanted)


@needs_compiler
def test_a_layer_in_two_places_is_packed_once(choose: Choose) -> None:
    choose("packed")
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.Sequential(layer))
    x = torch.randn(2, 32)
    with torch.inference_mode():
        wanted = model(x)
        assert accelerate_linears(model, own_weights=True).replaced == 1
        assert model[0] is model[1][0]  # type: ignore[index]
        torch.testing.assert_close(model(x), wanted)


@needs_compiler
def test_packed_weights_lie_side_by_side_in_large_pages() -> None:
    slabs = Slabs(native.kernel())
    first, second = slabs.take(100, torch.float32), slabs.take(7, torch.bfloat16)
    assert first.data_ptr() % LARGE_PAGE_BYTES == 0
    assert second.data_ptr() == first.data_ptr() + 448  # whole cache lines
    first.fill_(1)
    second.fill_(2)
    large = slabs.take(SLAB_BYTES, torch.bfloat16)
    assert large.data_ptr() % LARGE_PAGE_BYTES == 0
    assert float(first.sum()) == 100
    assert float(second.sum()) == 14


@needs_compiler
@pytest.mark.parametrize("kind", ["packed", "native"])
@pytest.mark.parametrize("family", ["mamba2", "mamba", "falcon_mamba", "asking"])
def test_families_that_read_weights_decode_as_their_generate(
    family: str, kind: str, choose: Choose, tmp_path: Path
) -> None:
    choose(kind)
    module = tiny_module("llama") if family == "asking" else state_space(family)
    if family == "asking":  # its feed-forward layer asks for a weight's type
        for block in module.model.layers:
            block.mlp.down_proj = AsksForType(block.mlp.down_proj)
    module.eval()
    wanted = hf_greedy(LanguageModel(module, accelerate=False), random_ids(12), 12)
    if family != "asking":
        module.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        model = load_model(tmp_path)
    else:
        model = LanguageModel(module, own_weights=True)
    assert model.linear.kind.startswith(kind)
    decoder = Engine(model)
    strategy = Host.installed().create("autoregressive", {})
    controls = Controls(max_new_tokens=12)
    assert decoder.generate(strategy, random_ids(12), controls).token_ids == wanted
    if kind == "packed":  # the others stay packed
        left = [m for m in model.model.modules() if isinstance(m, PackedLinear)]
        assert any(layer.packed is not None for layer in left)


class AsksForType(nn.Module):
    def __init__(self, wo: nn.Linear) -> None:
        super().__init__()
        self.wo = wo

    def forward(self, x: torch.Tensor) -> Any:
        assert isinstance(self.wo, nn.Linear)
        assert self.wo.weight.shape == (self.wo.out_features, self.wo.in_features)
        return self.wo(x.to(self.wo.weight.dtype).to(self.wo.weight.device))


def state_space(family: str) -> Any:
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "initializer_range": 0.4,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config: Any
    if family == "mamba2":
        config = transformers.Mamba2Config(
            **shared, num_heads=8, head_dim=8, n_groups=1, chunk_size=8
        )
    elif family == "mamba":
        config = transformers.MambaConfig(**shared)
    else:
        config = transformers.FalconMambaConfig(**shared)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


@needs_compiler
def test_a_packed_heads_size_is_known_without_unpacking_it(choose: Choose) -> None:
    choose("packed")
    model = LanguageModel(tiny_module("llama"), own_weights=True)
    head: Any = model.model.lm_head
    assert (model.head_size, model.vocab_size) == (32, VOCAB)
    assert model.input_size == VOCAB
    assert head.packed is not None


class Kept(torch.Tensor):
    """A subclass whose elements are no kernel's business."""


def normed() -> nn.Linear:
    weight_norm: Any = nn.utils.parametrizations.weight_norm
    layer: nn.Linear = weight_norm(nn.Linear(8, 8))
    return layer


def old_normed() -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed: nn.Linear = nn.utils.weight_norm(nn.Linear(8, 8))
    return normed


def changed(change: Callable[[nn.Linear], Any]) -> Callable[[], nn.Linear]:
    def make() -> nn.Linear:
        layer = nn.Linear(8, 8)
        change(layer)
        return layer

    return make


def put(layer: nn.Linear, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)


UNREADABLE: dict[str, Callable[[], nn.Linear]] = {
    "subclass": changed(lambda m: put(m, torch.ones(8, 8).as_subclass(Kept))),
    "meta": lambda: nn.Linear(8, 8, device="meta"),
    "sparse": changed(lambda m: put(m, torch.eye(8).to_sparse())),
    "csr": changed(lambda m: put(m, torch.eye(8).to_sparse_csr())),
    "mkldnn": changed(lambda m: put(m, torch.ones(8, 8).to_mkldnn())),
    "transposed": changed(lambda m: put(m, torch.arange(64.0).view(8, 8).T)),
    "strided": changed(lambda m: put(m, torch.ones(8, 16)[:, ::2])),
    "released": changed(lambda m: m.weight.untyped_storage().resize_(0)),
    "other shape": changed(lambda m: put(m, torch.ones(32))),
    "half bias": changed(lambda m: setattr(m, "bias", nn.Parameter(m.bias.half()))),
    "subclass bias": changed(
        lambda m: setattr(m, "bias", nn.Parameter(torch.ones(8).as_subclass(Kept)))
    ),
    "weight norm": normed,
    "old weight norm": old_normed,
    "own forward": changed(lambda m: setattr(m, "forward", lambda x: x)),
    "hook before": changed(lambda m: m.register_forward_pre_hook(lambda *_: None)),
}


@pytest.mark.parametrize("kind", ["packed", "native"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_only_plain_weights_are_replaced(
    case: str, kind: str, choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(kind)
    monkeypatch.setattr(subject, "kernel", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta
        layer = UNREADABLE[case]()
    module = nn.Sequential(layer)
    assert accelerate_linears(module, own_weights=True).replaced == 0
    assert module[0] is layer


@needs_compiler
def test_a_weight_that_is_changed_later_is_read_as_it_is_then(choose: Choose) -> None:
    choose("native")
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    accelerate_linears(model, own_weights=False)
    x = torch.randn(2, 8)
    with torch.inference_mode():
        for weight in (torch.ones(8, 16)[:, ::2], torch.eye(8).to_sparse()):
            put(model[0], weight)  # type: ignore[arg-type]
            wanted = x @ weight.to_dense().T
            torch.testing.assert_close(model(x), wanted)


@needs_compiler
def test_logits_of_a_subclass_are_ranked_by_torch() -> None:
    native.kernel()
    logits = torch.randn(3, 5000).as_subclass(Kept)
    assert native.largest(logits, 1) is None
    assert argmax_rows(logits) == logits.argmax(-1).tolist()
    assert native.largest(torch.randn(3, 5000), 1) is not None


@needs_compiler
def test_shared_parameters_stay_the_callers(choose: Choose) -> None:
    model = Tied()
    parameters = [(p, p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    choose("native")
    accelerate_linears(model, own_weights=False)
    assert len(list(model.parameters())) == len(parameters)
    for now, (was, pointer, values) in zip(model.parameters(), parameters, strict=True):
        assert now is was
        assert now.data_ptr() == pointer
        assert torch.equal(now, values)


@needs_compiler
def test_gradients_flow_where_they_are_wanted(choose: Choose) -> None:
    model = Tied()
    choose("native")
    accelerate_linears(model, own_weights=True)
    model(torch.tensor([1, 2])).sum().backward()
    assert model.inner.weight.grad is not None


def test_layers_with_hooks_or_other_types_are_left_alone(choose: Choose) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).half())
    model[1].register_forward_hook(lambda *_: None)
    kept = list(model)
    choose("native")
    report = accelerate_linears(model, own_weights=True)
    assert report.replaced == 0
    assert report.kind.startswith("none: ")
    assert list(model) == kept


def test_without_a_compiler_the_reason_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.NativeUnavailableError, match="no C compiler"):
        native.load_kernel()


def test_the_native_kernel_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTSPEC_NATIVE", "0")
    with pytest.raises(native.NativeUnavailableError, match="ADAPTSPEC_NATIVE=0"):
        native.load_kernel()


def test_a_compiler_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(native.NativeUnavailableError, match="no such option"):
        native.load_kernel()


def test_a_library_that_cant_be_loaded_is_no_native_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_compile", write_junk)
    if not any(shutil.which(name) for name in native.COMPILERS):
        pytest.skip("no compiler here")
    with pytest.raises(native.NativeUnavailableError, match="can't be used"):
        native.load_kernel()


def write_junk(_: str, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.so"
    path.write_bytes(b"not a library")
    return path


CALLS_THE_KERNEL = (
    "import torch; from adaptspec.acceleration import native\n"
    "kernel = native.kernel().linear\n"
    "print(kernel(torch.ones(2, 3), torch.ones(4, 3), None).sum().item())"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole library of this machine, compiled once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTSPEC_CACHE", str(folder))
        native.load_kernel()
    (library,) = (folder / "native").iterdir()
    return library


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kept", [0, 0.5, -1, "zeros", "flipped"])
def test_a_damaged_library_in_the_cache_is_compiled_again(
    kept: float | str,
    compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path))
    whole = compiled.read_bytes()
    if kept == "zeros":  # a power cut
        damaged = bytes(len(whole))
    elif kept == "flipped":
        damaged = whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:]
    else:
        assert not isinstance(kept, str)
        damaged = whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)]
    library = tmp_path / "native" / compiled.name
    library.parent.mkdir()
    library.write_bytes(damaged)
    done = subprocess.run(  # or a fault ended the tests, too
        [sys.executable, "-c", CALLS_THE_KERNEL], capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("24.0", 0), done.stderr
    (mended,) = (tmp_path / "native").iterdir()
    assert mended.stem.endswith(hashlib.sha256(mended.read_bytes()).hexdigest()[:16])


def test_the_kernel_and_the_default_model_share_one_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADAPTSPEC_CACHE", "~/x")
    monkeypatch.chdir(tmp_path)
    folders: list[Path] = []

    def compile_to(_: str, folder: Path, name: str) -> Path:
        folders.append(folder)
        raise native.NativeUnavailableError("enough")

    monkeypatch.setattr(native, "_compile", compile_to)
    if any(shutil.which(name) for name in native.COMPILERS):
        with pytest.raises(native.NativeUnavailableError, match="enough"):
            native.load_kernel()
        assert folders == [tmp_path / "home" / "x" / "native"]
    assert cache_folder.cache_root() == tmp_path / "home" / "x"
    monkeypatch.setenv("ADAPTSPEC_CACHE", "here")
    assert cache_folder.cache_root() == tmp_path / "here"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("folder", ["file/below", "~nobody-of-that-name/x"])
def test_a_cache_folder_that_cant_be_made_is_told_in_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    place = folder if folder.startswith("~") else str(tmp_path / folder)
    monkeypatch.setenv("ADAPTSPEC_CACHE", place)
    if any(shutil.which(name) for name in native.COMPILERS):
        with pytest.raises(native.NativeUnavailableError) as refused:
            native.load_kernel()
        assert "\n" not in str(refused.value)
    with pytest.raises(ModelLoadError, match="ADAPTSPEC_CACHE") as raised:
        default_model.default_model_path()
    assert "\n" not in str(raised.value)


def test_callers_weights_are_never_packed() -> None:
    for dtype in native.LINEAR_TYPES:  # packing would hold them twice
        assert subject.choose(dtype, False).kind in ("native", "none")


class Processor:
    """A kernel on a processor that isn't at hand."""

    def __init__(self, tiles: bool, pairs: bool) -> None:
        self.tiles, self.pairs = tiles, pairs


@pytest.mark.parametrize(
    ("tiles", "pairs", "dtype", "own", "expected"),
    [
        (True, True, torch.bfloat16, True, ("native", 64)),
        (True, True, torch.bfloat16, False, ("native", 64)),
        (True, True, torch.float32, True, ("packed", 64)),
        (False, True, torch.bfloat16, True, ("packed", 64)),
        (False, True, torch.bfloat16, False, ("native", 64)),
        (False, False, torch.bfloat16, True, ("packed", 1 << 30)),
        # torch's product widens every weight there, however many rows there are
        (False, False, torch.bfloat16, False, ("native", 1 << 30)),
        (False, False, torch.float32, False, ("native", 64)),
    ],
)
def test_the_processor_chooses_the_product(
    tiles: bool,
    pairs: bool,
    dtype: torch.dtype,
    own: bool,
    expected: tuple[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "kernel", lambda: Processor(tiles, pairs))
    chosen = subject.choose(dtype, own)
    assert (chosen.kind, chosen.most_rows) == expected


@pytest.mark.slow
@needs_compiler
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from adaptspec.acceleration import native\n"
        "import os, torch; os.environ['ADAPTSPEC_CACHE'] = sys.argv[1]\n"
        "kernel = native.kernel().linear\n"
        "print(kernel(torch.ones(2, 3), torch.ones(4, 3), None).sum().item())"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["24.0"] * 2
    assert len(list((tmp_path / "native").iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_verifying_a_chain_gives_the_bits_of_decoding_one_by_one(
    dtype: torch.dtype, choose: Choose
) -> None:
    choose("native")
    module = tiny_module("llama").to(dtype)
    model = LanguageModel(module)
    prompt, chain = random_ids(20), random_ids(6, seed=2)
    one_by_one, at_once = model.new_cache(), model.new_cache()
    model.prefill(prompt, one_by_one)
    model.prefill(prompt, at_once)
    sequential = [
        model.forward_tree(TokenTree.root_only(token), one_by_one).logits
        for token in chain
    ]
    together = model.forward_tree(TokenTree.chain(chain[0], chain[1:]), at_once).logits
    if attention_keeps_its_bits(dtype):
        assert torch.equal(together, torch.cat(sequential))
    else:
        torch.testing.assert_close(
            together, torch.cat(sequential), rtol=1e-5, atol=1e-4
        )


def attention_keeps_its_bits(dtype: torch.dtype) -> bool:
    """Whether torch's attention rounds a row alike, whatever rows stand beside it.

    On some processors it doesn't in float32, and no Linear layer can mend that.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((1, 4, rows, 8), generator=generator).to(dtype)
        for rows in (6, 26, 26)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = torch.zeros((1, 1, 6, 26), dtype=dtype)
    alone = [
        attend(query[:, :, i : i + 1], key, value, attn_mask=mask[:, :, i : i + 1])
        for i in range(6)
    ]
    return torch.equal(attend(query, key, value, attn_mask=mask), torch.cat(alone, 2))
