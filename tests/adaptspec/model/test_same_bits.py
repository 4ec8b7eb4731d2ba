"""A node's logits have the bits of plain decoding, whatever tree it stands in."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from adaptspec.model.cache import TreeCache
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import VOCAB, random_ids, tiny_module
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
