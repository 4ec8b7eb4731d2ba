"""Attention of few rows against an exact one, and what its bits depend on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptspec.acceleration import native
from adaptspec.acceleration.attention import (
    MOST_ROWS,
    grouped_attention,
    native_attention,
    use_our_attention,
)
from adaptspec.testing.fakes import tiny_module
from kernels import available, needs_compiler

TYPES = [torch.bfloat16, torch.float32]


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sees: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``[rows, heads, v]`` in float64, each row and head for itself."""
    heads, rows, _ = query.shape
    each = heads // key.shape[0]
    out = torch.zeros(rows, heads, value.shape[2], dtype=torch.float64)
    for h in range(heads):
        for t in range(rows):
            keys = key[h // each][sees[t]].double()
            weights = (keys @ query[h, t].double() * scale).softmax(0)
            out[t, h] = weights @ value[h // each][sees[t]].double()
    return out


def tensors(
    seed: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def random_sight(seed: int, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sees = torch.rand((rows, length), generator=generator) < 0.6
    sees[:, 0] = True
    return sees


def additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(
        ~sees, torch.finfo(dtype).min
    )


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 90),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from(TYPES),
    st.booleans(),
)
def test_it_equals_exact_attention_up_to_rounding(
    rows: int,
    length: int,
    groups: int,
    each: int,
    size: int,
    width: int,
    dtype: torch.dtype,
    boolean: bool,
) -> None:
    query, key, value = tensors(
        rows * length * size,
        dtype,
        (
            (groups * each, rows, size),
            (groups, length + 5, size),
            (groups, length + 5, width),
        ),
    )
    key, value = key[:, :length], value[:, :length]  # as a cache gives them
    sees = random_sight(length, rows, length)
    kernel = native.kernel()
    seen = kernel.seen(sees if boolean else additive(sees, dtype))
    assert seen is not None
    assert seen.counts.tolist() == sees.sum(1).tolist()
    scale = size**-0.5
    found = kernel.attend(query, key, value, seen, scale)
    wanted = exact(query, key, value, sees, scale)
    assert found.dtype == dtype
    tolerance = 1e-2 if dtype is torch.bfloat16 else 3e-6
    torch.testing.assert_close(
        found.double(), wanted, rtol=tolerance, atol=3 * tolerance
    )


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("each", "size"), [(1, 64), (3, 64), (7, 20), (4, 128)])
def test_a_rows_bits_depend_on_it_and_what_it_sees_alone(
    dtype: torch.dtype, each: int, size: int
) -> None:
    groups, rows, length = 2, 9, 61
    query, key, value = tensors(
        1,
        dtype,
        ((groups * each, rows, size), (groups, length, size), (groups, length, size)),
    )
    sees = random_sight(0, rows, length)
    kernel = native.kernel()

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return kernel.attend(query, key, value, kernel.seen(mask), 0.3)

    together = attend(query, key, value, sees)
    for t in range(rows):
        alone = query[:, t : t + 1].contiguous()
        assert torch.equal(attend(alone, key, value, sees[t : t + 1])[0], together[t])
        # the keys that it sees, moved together as a cache does with a kept path
        moved = [x[:, sees[t]].contiguous() for x in (key, value)]
        assert torch.equal(
            kernel.attend(alone, moved[0], moved[1], None, 0.3)[0], together[t]
        )


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_a_query_that_is_cut_from_a_wider_one_is_read_as_it_lies(
    dtype: torch.dtype,
) -> None:
    wide, key, value = tensors(2, dtype, ((5, 4, 3 * 64), (4, 7, 64), (4, 7, 64)))
    query = wide[..., 64:128].transpose(0, 1)  # [heads, rows, d] of [rows, heads, 3d]
    kernel = native.kernel()
    found = kernel.attend(query, key, value, None, 0.1)
    assert torch.equal(found, kernel.attend(query.contiguous(), key, value, None, 0.1))


@needs_compiler
@pytest.mark.parametrize(
    ("heads", "rows", "groups", "keys", "values", "mask"),
    [
        (2, 3, 4, 5, 5, (1, 1, 3, 5)),  # fewer heads than groups
        (3, 3, 2, 5, 5, (1, 1, 3, 5)),
        (2, 3, 2, 5, 4, (1, 1, 3, 5)),  # fewer values than keys
        (2, 3, 2, 5, 5, (1, 1, 1, 5)),  # one mask for all rows
    ],
)
def test_shapes_that_do_not_fit_are_torchs(
    heads: int,
    rows: int,
    groups: int,
    keys: int,
    values: int,
    mask: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "adaptspec.acceleration.attention.grouped_attention",
        lambda *_, **__: ("torch", None),
    )
    query, key, value = tensors(
        0,
        torch.float32,
        ((1, heads, rows, 8), (1, groups, keys, 8), (1, groups, values, 8)),
    )
    found, _ = native_attention(Layer(), query, key, value, torch.zeros(mask))
    assert found == "torch"


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES)
def test_scores_of_any_size_give_finite_weights(dtype: torch.dtype) -> None:
    query = torch.full((1, 1, 16), 30.0, dtype=dtype)
    key = torch.linspace(-30, 30, 40).to(dtype)[None, :, None].expand(1, 40, 16)
    value = torch.arange(40, dtype=dtype)[None, :, None].expand(1, 40, 8)
    found = native.kernel().attend(
        query, key.contiguous(), value.contiguous(), None, 1.0
    )
    assert torch.equal(found, torch.full((1, 1, 8), 39, dtype=dtype))


@needs_compiler
def test_a_key_that_is_no_number_reaches_the_rows_that_see_it_only() -> None:
    query, key, value = tensors(0, torch.float32, ((1, 2, 8), (1, 5, 8), (1, 5, 8)))
    key[0, 3, 2] = torch.nan
    sees = torch.ones((2, 5), dtype=torch.bool)
    sees[1, 3] = False
    found = native.kernel().attend(query, key, value, native.kernel().seen(sees), 1.0)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("dtype", [*TYPES, torch.bool])
def test_masks_that_weigh_keys_or_hide_all_are_no_sight(dtype: torch.dtype) -> None:
    kernel = native.kernel()
    if dtype is torch.bool:
        assert kernel.seen(torch.tensor([[True, False], [False, False]])) is None
        return
    mask = torch.zeros((2, 3), dtype=dtype)
    assert kernel.seen(mask) is not None
    for value in (-1.0, 0.5):
        weighed = mask.clone()
        weighed[1, 1] = value
        assert kernel.seen(weighed) is None
    hidden = mask.clone()
    hidden[1] = -torch.inf
    assert kernel.seen(hidden) is None
    assert kernel.seen(mask.double()) is None


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 3


@needs_compiler
@pytest.mark.parametrize("rows", [1, 4, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("masked", [True, False])
def test_the_layers_attention_is_transformers(rows: int, masked: bool) -> None:
    query, key, value = tensors(
        rows, torch.float32, ((1, 6, rows, 16), (1, 2, rows, 16), (1, 2, rows, 16))
    )
    sees = torch.ones((rows, rows), dtype=torch.bool).tril()
    mask = additive(sees, torch.float32)[None, None] if masked else None
    layer = Layer().eval()
    with torch.inference_mode():
        found, _ = native_attention(layer, query, key, value, mask)
        wanted, _ = grouped_attention(layer, query, key, value, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bias", "sinks", "dropout", "batch", "weighed"])
def test_what_the_kernel_doesnt_compute_is_left_to_torch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("the kernel must not be asked")

    monkeypatch.setattr(native.Kernel, "attend", refuse)
    monkeypatch.setattr(
        "adaptspec.acceleration.attention.grouped_attention",
        lambda *_, **__: ("torch", None),
    )
    count = 2 if case == "batch" else 1
    query, key, value = tensors(
        0, torch.float32, ((count, 2, 3, 8), (count, 2, 5, 8), (count, 2, 5, 8))
    )
    mask = torch.zeros((1, 1, 3, 5))
    arguments: dict[str, Any] = {}
    if case == "bias":
        arguments["position_bias"] = torch.zeros(1)
    if case == "sinks":
        arguments["s_aux"] = torch.zeros(2)
    if case == "weighed":
        mask[0, 0, 1, 1] = -0.5
    dropout = 0.5 if case == "dropout" else 0.0
    if available():
        found, _ = native_attention(
            Layer(), query, key, value, mask, dropout, **arguments
        )
        assert found == "torch"


def test_without_a_compiler_heads_are_grouped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> native.Kernel:
        raise native.NativeUnavailableError("none")

    monkeypatch.setattr("adaptspec.acceleration.attention.kernel", missing)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    module = tiny_module("llama")
    module.set_attn_implementation("sdpa")
    assert use_our_attention(module) == "adaptspec_grouped"
    module.set_attn_implementation("eager")
    assert use_our_attention(module) is None


def test_code_that_asks_for_sdpa_by_name_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sparse attention hides keys only under names that it knows."""
    (tmp_path / "sparse_layers.py").write_text(
        "from torch import nn\n\n\nclass Sparse(nn.Module):\n"
        "    def forward(self, x):\n"
        '        return -x if self.implementation == "sdpa" else x\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    import sparse_layers  # type: ignore[import-not-found]

    module = tiny_module("llama")
    assert use_our_attention(copy.deepcopy(module)) is not None
    module.model.layers[0].sparse = sparse_layers.Sparse()
    assert use_our_attention(module) is None
    assert module.config._attn_implementation == "sdpa"
