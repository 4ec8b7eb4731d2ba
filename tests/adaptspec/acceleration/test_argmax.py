"""Our kernel's and the blocked argmax against Python's, and the kernel's ranking."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.acceleration import argmax, native
from adaptspec.acceleration.argmax import ROW_BLOCKS, argmax_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def by(way: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if way == "torch":
            patch.setattr(argmax, "largest", lambda x, count: None)
        else:
            try:
                native.kernel()
            except native.NativeUnavailableError as error:
                pytest.skip(str(error))
            patch.setattr(argmax, "ROW_BLOCKS", None)  # not gone on to
        yield


ways = pytest.mark.parametrize("way", ["native", "torch"])


@pytest.mark.slow
@ways
@settings(deadline=None, max_examples=60)
@given(
    vocab=st.integers(1, 3 * ROW_BLOCKS * ROW_BLOCKS),
    rows=st.integers(1, 5),
    levels=st.sampled_from([2, 50, 100_000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_the_first_of_the_largest_is_found(
    way: str, vocab: int, rows: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    """Few levels give many ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (rows, vocab), generator=generator)
    logits = logits.to(dtype)
    expected = [
        next(i for i, value in enumerate(row) if value == max(row))
        for row in logits.double().tolist()
    ]
    with by(way):
        assert argmax_rows(logits) == expected


@ways
@pytest.mark.parametrize("at", [0, 63, 64, 4095, 8191, 8200])
def test_a_lone_maximum_is_found_everywhere(way: str, at: int) -> None:
    logits = torch.full((2, 8201), -torch.inf)
    logits[1, at] = -5.0
    with by(way):
        assert argmax_rows(logits) == [0, at]


@ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_of_both_signs_are_equal(way: str, dtype: torch.dtype) -> None:
    logits = torch.full((2, 9000), -1.0, dtype=dtype)
    logits[0, 5000], logits[0, 6000] = -0.0, 0.0
    logits[1, 5000], logits[1, 6000] = 0.0, -0.0
    with by(way):
        assert argmax_rows(logits) == [5000, 5000]


def test_a_view_of_other_strides_is_read_right() -> None:
    logits = torch.randn(9000, 3)
    assert argmax_rows(logits.T) == logits.T.argmax(-1).tolist()


@settings(deadline=None, max_examples=80)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 4))
def test_the_kernel_ranks_as_a_stable_sort_does(
    data: st.DataObject, dtype: torch.dtype, rows: int
) -> None:
    """Ties, infinities, blocks begun and rows that don't follow each other."""
    wide, start = data.draw(st.integers(2, 700)), data.draw(st.integers(0, 1))
    count = data.draw(st.integers(1, min(native.MOST_KEPT, wide - start)))
    spread = data.draw(st.sampled_from([1, 9, 1000]))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-spread, spread + 1, (rows, wide), generator=generator)
    x = (x / 8).to(dtype)
    x[x == spread / 8] = math.inf
    x[x == -spread / 8] = -math.inf
    x = x[:, start:]
    with by("native"):
        found = native.largest(x, count)
    assert found is not None
    expected = [
        sorted(range(len(row)), key=lambda i, row=row: -row[i])[:count]  # type: ignore[misc]
        for row in x.tolist()
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("x", "count"),
    [
        (torch.zeros(2, 9, dtype=torch.float64), 1),
        (torch.zeros(9, 2).T, 1),
        (torch.zeros(9), 1),
        (torch.zeros(2, 9), 10),
        (torch.zeros(2, 99), native.MOST_KEPT + 1),
        (torch.zeros(2, 9, device="meta"), 1),
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_torch(
    x: torch.Tensor, count: int
) -> None:
    with by("native"):
        assert native.largest(x, count) is None


def test_nothing_is_compiled_for_an_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.cache
    def kernel() -> native.Kernel:
        raise AssertionError("must not be called")

    monkeypatch.setattr(native, "_found", kernel)
    assert native.largest(torch.zeros(2, 9), 1) is None
