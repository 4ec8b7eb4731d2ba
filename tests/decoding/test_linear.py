"""Replaced Linear layers against exact products, and what they leave alone."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptspec.decoding import linear as subject
from adaptspec.decoding import native
from adaptspec.decoding.linear import Plan, accelerate_linears
from adaptspec.decoding.tree import TokenTree
from adaptspec.models import LanguageModel
from adaptspec.testing.fakes import random_ids, tiny_module

Choose = Callable[[str], None]


def available() -> bool:
    try:
        native.kernel()
    except native.NativeUnavailableError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not available(), reason="no native kernel here")


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Make the measured choice come out as told."""

    def choose(kind: str) -> None:
        plan = Plan(cast(Any, kind), 1 << 30, "chosen by the test")
        monkeypatch.setattr(subject, "choose", lambda *_: plan)

    return choose


@pytest.mark.parametrize(
    ("four", "six", "expected"),
    [(0.8, 0.9, 4), (0.9, 0.8, 6), (0.98, 0.96, 1), (1.5, 2.0, 1)],
)
def test_few_rows_are_filled_up_where_that_takes_less_time(
    four: float,
    six: float,
    expected: int,
    choose: Choose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose("packed")
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    report = accelerate_linears(module, own_weights=True)
    assert subject.fill_up(module, report) == report  # too small to matter
    monkeypatch.setattr(subject, "FEW_WEIGHTS", 0)
    now = 0.0

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += {1: 1.0, 4: four, 6: six}[len(x)]
        return x

    monkeypatch.setattr(subject.PackedLinear, "forward", forward)
    monkeypatch.setattr(subject, "perf_counter", lambda: now)
    told = subject.fill_up(module, report)
    assert (told.filled, told.replaced) == (expected, 2)
    assert f"{min(four, six):.2f}x of one" in told.kind


@needs_compiler
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
    rows: int, inner: int, outer: int, bias: bool, dtype: torch.dtype, strided: bool
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
    found = native.kernel().linear(x.contiguous(), weight, added)
    # inner additions in float, and half a unit of the output's last place
    bound = sizes * inner * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= bound + 1e-30).all()


@needs_compiler
@pytest.mark.parametrize("inner", [197, 1205])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_the_same_bits_whatever_rows_are_beside_it(
    dtype: torch.dtype, inner: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(53, inner).to(dtype)
    x = torch.randn(70, inner).to(dtype)
    kernel = native.kernel().linear
    alone = torch.cat([kernel(row[None], weight, None) for row in x])
    for rows in range(1, 71):
        assert torch.equal(kernel(x[:rows], weight, None), alone[:rows])


@needs_compiler
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not needed <= set(native._cpu_flags().split()):
        pytest.skip(f"this processor hasn't all of {', '.join(sorted(needed))}")
    flags = [f for f in native.FLAGS if not f.startswith("-march")]
    monkeypatch.setattr(native, "FLAGS", (*flags, f"-march={machine}"))
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path))
    built = native.kernel.__wrapped__()
    assert built.lanes == lanes
    assert not built.tiles
    torch.manual_seed(0)
    weight, x = torch.randn(37, 611).to(dtype), torch.randn(9, 611).to(dtype)
    exact = x.double() @ weight.double().T
    sizes = x.double().abs() @ weight.double().abs().T
    found = built.linear(x, weight, None)
    bound = sizes * 611 * 2.0**-24 + exact.abs() * torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= bound).all()
    assert torch.equal(built.linear(x[3:4], weight, None), found[3:4])


@pytest.mark.skipif(not available() or not native.kernel().tiles, reason="no AMX here")
def test_without_leave_to_use_tiles_the_kernel_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    weight, x = (torch.randn(n, 611).to(torch.bfloat16) for n in (37, 40))
    on_tiles = native.kernel().linear(x, weight, None)
    refused = native.kernel.__wrapped__()
    refused.tiles = False
    monkeypatch.delattr(refused, "_on_tiles")
    without = refused.linear(x, weight, None)
    # two roundings of nearly the same sum: a unit of the last place apart at most
    torch.testing.assert_close(on_tiles, without, rtol=2.0**-7, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_and_infinity_reach_their_rows_only(dtype: torch.dtype) -> None:
    x = torch.ones(3, 37, dtype=dtype)
    x[0, 36], x[1, 3] = math.nan, math.inf
    found = native.kernel().linear(x, torch.ones(5, 37, dtype=dtype), None)
    assert found[0].isnan().all()
    assert (found[1] == math.inf).all()
    assert (found[2] == 37).all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 32)
        self.inner = nn.Linear(32, 32)
        self.head = nn.Linear(32, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(self.embedding(ids)))
        return out


def parameter_bytes(model: nn.Module) -> int:
    seen = {p.data_ptr(): p.nbytes for p in model.parameters()}
    packed = (m._packed for m in model.modules() if isinstance(m, subject.PackedLinear))
    return sum(seen.values()) + sum(p.numel() * p.element_size() for p in packed)


@pytest.mark.parametrize("kind", ["native", "packed"])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replaced_model_computes_the_same_and_holds_no_weight_twice(
    kind: str, rows: int, dtype: torch.dtype, choose: Choose
) -> None:
    if kind == "native" and not available():
        pytest.skip("no native kernel here")
    if kind == "packed":
        try:
            subject.pack(torch.zeros(8, 8, dtype=dtype))
        except RuntimeError as error:  # as `choose` finds out
            pytest.skip(str(error).splitlines()[0])
    torch.manual_seed(1)
    model = Tied().to(dtype)
    ids = torch.arange(rows) % 24
    before, size = model(ids).detach(), parameter_bytes(model)
    choose(kind)
    report = accelerate_linears(model, own_weights=True)
    with torch.inference_mode():
        after = model(ids)
    assert report.replaced == (2 if kind == "native" else 1)
    assert model.head.weight is model.embedding.weight
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)
    assert parameter_bytes(model) == size


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
        native.kernel.__wrapped__()


def test_the_native_kernel_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTSPEC_NATIVE", "0")
    with pytest.raises(native.NativeUnavailableError, match="ADAPTSPEC_NATIVE=0"):
        native.kernel.__wrapped__()


def test_a_compiler_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(native.NativeUnavailableError, match="no such option"):
        native.kernel.__wrapped__()


def test_a_damaged_library_is_no_native_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADAPTSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_compile", lambda _, path: write_junk(path))
    if not any(shutil.which(name) for name in native.COMPILERS):
        pytest.skip("no compiler here")
    with pytest.raises(native.NativeUnavailableError, match="can't be used"):
        native.kernel.__wrapped__()


def write_junk(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not a library")


@pytest.mark.parametrize(
    ("slow_from", "reach"), [(64, 32), (256, 64), (1 << 20, 1 << 30)]
)
def test_the_native_product_reaches_as_far_as_it_is_faster_on_both_shapes(
    slow_from: int, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def race(
        candidates: dict[str, Any], rows: int, dtype: torch.dtype, inner: int
    ) -> dict[str, float]:
        seen.append((rows, inner))
        # slower on the first shape by less than it is faster on the second, and back
        by = {4096: 0.4, 1536: -1.0}[inner]
        return {"none": 1.0, "native": 1.0 + (-by if rows >= slow_from else by)}

    monkeypatch.setattr(subject, "_race", race)
    weights = [torch.zeros(subject.TRIAL_SHAPE, dtype=torch.bfloat16)]
    assert subject._reach(weights) == reach
    assert seen[:2] == [(64, 4096), (64, 1536)]


def test_callers_weights_are_never_packed() -> None:
    plan = subject.choose(torch.float32, False)
    assert plan.kind in ("native", "none")  # packing would change the caller's weights
    assert subject.choose(torch.float32, False) is plan


@needs_compiler
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from adaptspec.decoding import native\n"
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
        model.verify(TokenTree.root_only(token), one_by_one).logits for token in chain
    ]
    together = model.verify(TokenTree.chain(chain[0], chain[1:]), at_once).logits
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
