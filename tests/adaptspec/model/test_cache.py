"""The cache against a fresh prefill of the accepted tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.model.cache import GROWTH_ROWS, TreeCache, TreeLayer
from adaptspec.testing.fakes import random_ids
from adaptspec.testing.strategies import target_and_draft
from adaptspec.token_tree import TokenTree

PROMPT = random_ids(13, seed=4)  # longer than the sliding windows
TREE = TokenTree(tokens=(5, 9, 11, 30, 31, 32, 33), parents=(-1, 0, 0, 1, 2, 4, 5))


def rows(layer: TreeLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept keys and values."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]


def numbered(first: int, count: int) -> torch.Tensor:
    """Rows whose contents say which they are."""
    return torch.arange(first, first + count).float().expand(1, 2, 4, count).mT


@pytest.mark.parametrize("path", [[0], [0, 1, 3], [0, 2, 4], [0, 2, 4, 5, 6]])
@pytest.mark.parametrize(
    "architecture", ["llama", "gemma3", "mistral", "gpt2", "opt", "mixtral", "falcon"]
)
def test_after_a_path_is_kept_the_cache_is_that_of_a_fresh_prefill(
    architecture: str, path: list[int]
) -> None:
    model = target_and_draft(architecture)[0]
    cache = model.new_cache(64)
    model.prefill(PROMPT, cache)
    model.forward_tree(TREE, cache)
    cache.keep(len(PROMPT), path)
    fresh = model.new_cache(64)
    accepted = [*PROMPT, *(TREE.tokens[node] for node in path)]
    model.prefill(accepted, fresh)
    assert cache.length == fresh.length == len(accepted)
    for kept, expected in zip(cache.rows, fresh.rows, strict=True):
        for found, wanted in zip(rows(kept), rows(expected), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # What decoding goes on with is the same too.
    following = TokenTree.root_only(7)
    torch.testing.assert_close(
        model.forward_tree(following, cache).logits,
        model.forward_tree(following, fresh).logits,
        rtol=1e-3,
        atol=1e-3,
    )


def test_appending_within_the_capacity_copies_nothing() -> None:
    layer = TreeLayer(capacity=32)
    layer.update(numbered(0, 5), numbered(0, 5))
    assert layer.keys is not None
    buffer = layer.keys.data_ptr()
    for first in range(5, 32, 3):
        keys, _ = layer.update(numbered(first, 3), numbered(first, 3))
        assert layer.keys.data_ptr() == buffer
        assert keys.data_ptr() == buffer
    assert layer.length == 32


def test_rows_survive_growth_beyond_the_capacity() -> None:
    layer = TreeLayer(capacity=4)
    count = GROWTH_ROWS + 40
    for row in range(count):
        layer.update(numbered(row, 1), numbered(row, 1) + 0.5)
    keys, values = rows(layer)
    assert keys[0, 0, :, 0].tolist() == list(range(count))
    assert values[0, 1, :, 3].tolist() == [row + 0.5 for row in range(count)]


def test_keeping_a_prefix_touches_no_row() -> None:
    cache = TreeCache(2, capacity=16)
    for layer in cache.rows:
        layer.update(numbered(0, 10), numbered(0, 10))
    versions = [layer.keys._version for layer in cache.rows if layer.keys is not None]
    cache.keep(6, [0, 1])
    assert cache.length == 8
    assert versions == [
        layer.keys._version for layer in cache.rows if layer.keys is not None
    ]


@settings(max_examples=50)
@given(st.integers(0, 6), st.sets(st.integers(0, 9)))
def test_any_ascending_choice_of_appended_rows_can_be_kept(
    base: int, nodes: set[int]
) -> None:
    cache = TreeCache(1, capacity=8)
    cache.rows[0].update(numbered(0, base + 10), numbered(0, base + 10))
    cache.keep(base, sorted(nodes))
    keys, values = rows(cache.rows[0])
    expected = [*range(base), *(base + node for node in sorted(nodes))]
    assert keys[0, 1, :, 2].tolist() == expected
    assert values[0, 0, :, 0].tolist() == expected


def test_truncating_forgets_the_last_rows_and_cannot_bring_rows_back() -> None:
    cache = TreeCache(2, capacity=8)
    for layer in cache.rows:
        layer.update(numbered(0, 6), numbered(0, 6))
    cache.truncate(2)
    assert [layer.length for layer in cache.rows] == [2, 2]
    with pytest.raises(ValueError, match="length <= 2"):
        cache.truncate(3)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=12), st.integers(0, 5000))
def test_buffers_are_hardly_larger_than_the_rows_in_them(
    appended: list[int], capacity: int
) -> None:
    layer = TreeLayer(capacity)
    copied = total = 0
    for count in appended:
        before = layer.keys
        layer.update(torch.zeros(1, 1, count, 1), torch.zeros(1, 1, count, 1))
        if before is not None and layer.keys is not before:
            copied += total
        total += count
        assert layer.keys is not None
        held = layer.keys.shape[2]
        assert total <= held <= total + max(GROWTH_ROWS, total // 4)
        if total <= capacity:
            assert held <= capacity
    assert copied <= 5 * total  # each row a few times, however many there are
