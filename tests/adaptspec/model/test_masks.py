"""The ancestor mask against a naive walk up the parents."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.model.masks import Reach, causal_mask, layer_reaches, tree_mask
from adaptspec.testing.fakes import tiny_model
from adaptspec.token_tree import TokenTree

CPU = torch.device("cpu")
reaches = st.one_of(
    st.just(Reach()),
    st.builds(Reach, window=st.integers(1, 9)),
    st.builds(Reach, chunk=st.integers(1, 9)),
)


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any topology of up to 12 nodes."""
    count = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, count))]
    return TokenTree([0] * count, parents)


def within(query: int, key: int, reach: Reach) -> bool:
    """Whether a token at position ``query`` may look back to position ``key``."""
    if reach.window is not None and query - key >= reach.window:
        return False
    return reach.chunk is None or query // reach.chunk == key // reach.chunk


def walk_up(tree: TokenTree, cached: int, reach: Reach) -> list[list[bool]]:
    """What each node may attend to, found by following parents one at a time."""

    def depth(node: int) -> int:
        return 0 if node == 0 else 1 + depth(tree.parents[node])

    allowed = []
    for node in range(len(tree)):
        position = cached + depth(node)
        row = [within(position, key, reach) for key in range(cached)]
        row += [False] * len(tree)
        ancestor = node
        while ancestor != -1:
            at = cached + depth(ancestor)
            row[cached + ancestor] = within(position, at, reach)
            ancestor = tree.parents[ancestor]
        allowed.append(row)
    return allowed


@given(trees(), st.integers(0, 12), reaches)
def test_a_node_attends_to_its_ancestors_and_the_cached_rows_in_reach(
    tree: TokenTree, cached: int, reach: Reach
) -> None:
    mask = tree_mask(tree, cached, reach, torch.float32, CPU)[0, 0]
    assert (mask == 0).tolist() == walk_up(tree, cached, reach)


@given(st.integers(1, 8), st.integers(0, 12), reaches)
def test_a_chain_and_successive_tokens_get_the_same_mask(
    count: int, cached: int, reach: Reach
) -> None:
    chain = TokenTree.chain(0, [0] * (count - 1))
    as_tree = tree_mask(chain, cached, reach, torch.float32, CPU)
    as_tokens = causal_mask(count, cached, reach, torch.float32, CPU)
    assert torch.equal(as_tree, as_tokens)


def test_a_masked_key_keeps_a_finite_weight_in_half_precision() -> None:
    tree = TokenTree((0, 0, 0), (-1, 0, 0))
    for dtype in (torch.float16, torch.bfloat16):
        mask = tree_mask(tree, 2, Reach(), dtype, CPU)
        assert mask.dtype is dtype
        assert torch.isfinite(mask).all()


def test_hybrid_models_get_one_reach_for_each_type_of_layer() -> None:
    assert layer_reaches(tiny_model("gemma3").config) == {
        "full_attention": Reach(),
        "sliding_attention": Reach(window=8),
    }
    mistral = layer_reaches(tiny_model("mistral").config)
    assert list(mistral.values()) == [Reach(window=8)]
