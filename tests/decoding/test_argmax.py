"""The blocked argmax against torch's own on float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.decoding.argmax import BLOCKS, argmax_rows


@settings(deadline=None, max_examples=60)
@given(
    vocab=st.integers(1, 3 * BLOCKS * BLOCKS),
    rows=st.integers(1, 5),
    levels=st.sampled_from([2, 50, 100_000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_the_first_of_the_largest_is_found(
    vocab: int, rows: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    """Few levels give many ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (rows, vocab), generator=generator)
    logits = logits.to(dtype)
    expected = [
        next(i for i, value in enumerate(row) if value == max(row))
        for row in logits.double().tolist()
    ]
    assert argmax_rows(logits) == expected


@pytest.mark.parametrize("at", [0, 63, 64, 4095, 8191, 8200])
def test_a_lone_maximum_is_found_everywhere(at: int) -> None:
    logits = torch.full((2, 8201), -torch.inf)
    logits[1, at] = -5.0
    assert argmax_rows(logits) == [0, at]


def test_a_view_of_other_strides_is_read_right() -> None:
    logits = torch.randn(9000, 3)
    assert argmax_rows(logits.T) == logits.T.argmax(-1).tolist()
