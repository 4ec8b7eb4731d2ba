"""Whether a node's logits have the bits of plain decoding, wherever it is read.

Our kernels sum in an order that doesn't depend on the rows of a pass. What a model
computes by other means (experts, an attention of its own, products of another library)
may round by them: of two tokens whose logits are as close as that, a draft's pass may
then choose the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from adaptspec.model.reference import (
    in_one_line,
    logit_distance,
    random_tokens,
    room,
)
from adaptspec.token_tree import TokenTree

if TYPE_CHECKING:
    from adaptspec.model.forward import ForwardModel, Level

PROMPT_TOKENS = 9
# Below a chain of five there are branches, so that keeping it moves rows.
TREE_PARENTS = (-1, 0, 0, 1, 2, 2, 4, 4, 5, 7, 3, 9, 9)
WIDE_ROWS = 64


@torch.inference_mode()
def what_differs(model: ForwardModel, level: Level) -> str:
    """In which passes a node's logits have other bits than alone; empty if in none.

    About ten forwards of few tokens: a path is read token by token, as a chain, in a
    tree and in a wide one, and what follows it once its rows have moved in the cache.

    Args:
        level: What of drafts is verified; what is decoded plainly is never compared.
    """
    if level == "plain":
        return ""
    try:
        found = _differences(model, trees=level == "tree")
    except Exception as error:  # whatever the model's own code raises
        return f"passes couldn't be compared ({in_one_line(error)})"
    if not found:
        return ""
    return (
        f"logits have other bits than alone {', '.join(found)}, and move by up to "
        f"{max(found.values()):.1g} of their size"
    )


def _differences(model: ForwardModel, *, trees: bool) -> dict[str, float]:
    """The passes in which bits differ, in words, and by how much (relative)."""
    most = max(1, (room(model) - len(TREE_PARENTS)) // 2)
    prompt = random_tokens(model, min(PROMPT_TOKENS, most))
    tokens = random_tokens(model, len(TREE_PARENTS) + 1)[::-1]
    next_token = tokens.pop()
    tree = TokenTree(tokens, TREE_PARENTS)
    path = tree.ancestors()[-1]
    chain = TokenTree.chain(tokens[0], [tokens[node] for node in path[1:]])

    plain = model.new_cache(len(prompt) + WIDE_ROWS)
    model.prefill(prompt, plain)
    alone = []
    for node in path:
        one = model.forward_tree(TokenTree.root_only(tokens[node]), plain)
        alone.append(one.logits[0].clone())
    root = TokenTree.root_only(next_token)
    after = model.forward_tree(root, plain).logits[0].clone()

    cache = model.new_cache(len(prompt) + WIDE_ROWS)
    model.prefill(prompt, cache)
    passes: list[tuple[TokenTree, Sequence[int]]] = [(chain, range(len(path)))]
    if trees:
        beside = max(0, min(WIDE_ROWS, room(model) - len(prompt) - 2) - len(tree))
        others = [*tokens, *random_tokens(model, beside)]
        wide = TokenTree(others, (*TREE_PARENTS, *[0] * beside))
        passes += [(tree, path), (wide, path)]
    found: dict[str, float] = {}

    def compare(
        where: str, rows: list[torch.Tensor], expected: list[torch.Tensor]
    ) -> None:
        if not all(map(torch.equal, rows, expected)):
            found[where] = max(map(logit_distance, rows, expected))

    for draft, nodes in passes:
        cache.truncate(len(prompt))
        forward = model.forward_tree(draft, cache)
        rows = [forward.logits[forward.rows[node]] for node in nodes]
        kind = "chain" if draft is chain else "tree"
        compare(f"in a {kind} of {len(draft)}", rows, alone)
    cache.keep(len(prompt), list(nodes))
    moved = model.forward_tree(root, cache).logits[0]
    compare("after drafted tokens were kept", [moved], [after])
    return found
