"""A node's logits have the bits of plain decoding, whatever tree it stands in."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptspec.model.cache import TreeCache, TreeLayer
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.rounding import output_note
from adaptspec.testing.fakes import ARCHITECTURES, VOCAB, random_ids, tiny_module
from adaptspec.token_tree import TokenTree
from kernels import needs_compiler

# Families all of whose products and attention our kernels compute. Of others (Conv1D of
# GPT-2, experts, attention of their own) torch rounds float32 by the number of rows.
FAMILIES = [
    *("llama", "qwen2", "qwen3", "gemma3", "mistral", "gpt_neox", "phi", "opt"),
]
PROMPT = random_ids(20)


pytestmark = needs_compiler


def random_tree(nodes: int, seed: int) -> TokenTree:
    """Each node below one of the five before it, no token twice below one node."""
    random_ = random.Random(seed)
    parents = [-1, *(random_.randrange(max(0, i - 5), i) for i in range(1, nodes))]
    tokens = [random_.randrange(2, VOCAB)]
    for i in range(1, nodes):
        taken = {tokens[j] for j in range(1, i) if parents[j] == parents[i]}
        tokens.append(random_.choice([t for t in range(2, VOCAB) if t not in taken]))
    return TokenTree(tokens, parents)


def path_to(tree: TokenTree, node: int) -> list[int]:
    path = [node]
    while (parent := tree.parents[path[-1]]) != -1:
        path.append(parent)
    return path[::-1]


def filled(model: LanguageModel) -> TreeCache:
    cache = model.new_cache()
    model.prefill(PROMPT, cache)
    return cache


def one_by_one(
    model: LanguageModel, tokens: Sequence[int], cache: TreeCache
) -> torch.Tensor:
    """Logits ``[vocab]`` after the last of ``tokens``."""
    for token in tokens:
        logits = model.forward_tree(TokenTree.root_only(token), cache).logits
    return logits[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("own_weights", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_of_a_tree_has_the_bits_of_plain_decoding(
    family: str, own_weights: bool, dtype: torch.dtype
) -> None:
    module = tiny_module(family).to(dtype)
    model = LanguageModel(module, own_weights=own_weights)
    for nodes in (3, 12, 40):
        tree = random_tree(nodes, seed=nodes)
        forward = model.forward_tree(tree, filled(model))
        for node in range(0, nodes, 3):
            tokens = [tree.tokens[i] for i in path_to(tree, node)]
            alone = one_by_one(model, tokens, filled(model))
            assert torch.equal(forward.logits[forward.rows[node]], alone), node


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_behind_a_path_that_moved_in_the_cache_keeps_its_bits(
    dtype: torch.dtype,
) -> None:
    model = LanguageModel(tiny_module("qwen2").to(dtype), own_weights=True)
    tree = random_tree(24, seed=1)
    path = path_to(tree, 23)
    moved = filled(model)
    model.forward_tree(tree, moved)
    moved.keep(len(PROMPT), path)
    plain = filled(model)
    one_by_one(model, [tree.tokens[i] for i in path], plain)
    after = random_ids(4, seed=7)
    assert torch.equal(one_by_one(model, after, moved), one_by_one(model, after, plain))


@functools.cache
def tiny(family: str, dtype: torch.dtype) -> LanguageModel:
    return LanguageModel(tiny_module(family).to(dtype), own_weights=True)


def nodes_that_differ(model: LanguageModel, tree: TokenTree) -> list[int]:
    """The nodes whose logits haven't the bits that reading token by token gives."""
    if model.capability.level == "chain":
        tree = TokenTree.chain(tree.tokens[0], tree.tokens[1:16])
    forward = model.forward_tree(tree, filled(model))
    alone = {-1: filled(model)}
    differing = []
    for node, parent in enumerate(tree.parents):
        tokens = [tree.tokens[i] for i in path_to(tree, node)]
        if parent not in alone or alone[parent].length != len(PROMPT) + len(tokens) - 1:
            alone[node] = filled(model)
            logits = one_by_one(model, tokens, alone[node])
        else:
            logits = one_by_one(model, tokens[-1:], alone[parent])
            alone[node] = alone.pop(parent)
        if not torch.equal(forward.logits[forward.rows[node]], logits):
            differing.append(node)
    return differing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {"mamba"}))
def test_what_is_said_of_a_models_bits_holds_for_random_trees(
    family: str, dtype: torch.dtype
) -> None:
    model = tiny(family, dtype)
    if model.rounding:
        # Half precision hides most of it.
        exact = tiny(family, torch.float32)
        trees = (random_tree(4 + 3 * seed, seed) for seed in range(20))
        assert any(nodes_that_differ(exact, tree) for tree in trees)
        return

    @settings(max_examples=12, deadline=None)
    @given(nodes=st.integers(1, 64), seed=st.integers(0, 1 << 16))
    def check(nodes: int, seed: int) -> None:
        assert nodes_that_differ(model, random_tree(nodes, seed)) == []

    check()


class OtherOrder(nn.Linear):
    """Adds in another order where there are more than ``rows`` rows."""

    rows = 8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.shape[-2] > self.rows:
            return nn.functional.linear(input.double(), self.weight.double()).to(input)
        return (input[..., None, :] * self.weight).sum(-1)


def test_a_product_that_depends_on_the_number_of_rows_is_found_out() -> None:
    module = tiny_module("llama")
    for layer in module.model.layers:
        other = OtherOrder(64, 32, bias=False)
        other.load_state_dict(layer.mlp.down_proj.state_dict())
        layer.mlp.down_proj = other
    model = LanguageModel(module)
    assert model.capability.level == "tree"
    assert "in a tree of 13, in a tree of 64" in model.rounding
    assert "in a chain" not in model.rounding  # of fewer rows than eight
    note = "outputs equal plain decoding's up to near ties: logits have other bits than"
    assert output_note(model.rounding).startswith(note)


def test_rows_that_change_when_they_move_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = TreeLayer.keep

    def inexact(self: Any, base: int, rows: torch.Tensor | None, count: int) -> None:
        keep(self, base, rows, count)
        if rows is not None:
            self.values[:, :, base + count - 1] *= 1 + 2**-20

    model = LanguageModel(tiny_module("llama"))
    assert model.capability.level == "tree"
    monkeypatch.setattr(TreeLayer, "keep", inexact)
    assert "than alone after drafted tokens were kept, and move" in model.rounding


def test_a_model_that_decodes_plainly_is_plain_decoding() -> None:
    model = LanguageModel(tiny_module("mamba"))
    assert model.capability.level == "plain"
    assert output_note(model.rounding).endswith("equal plain decoding's bit for bit")
