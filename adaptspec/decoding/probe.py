"""What a model's forward can verify, found out by comparing it with itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adaptspec.decoding.tree import TokenTree

if TYPE_CHECKING:
    from adaptspec.models import Capability, LanguageModel

PROMPT_TOKENS = 12
WIDEST_WINDOW_PROBED = 64

# Relative error of logits that rounding explains; a wrong mask or position gives more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
# In half precision rounding alone moves logits; how far is measured on the model.
HALF_TOLERANCE = 0.1
NOISE_ALLOWED = 3.0
MOST_TOLERATED = 0.4


@torch.inference_mode()
def probe(model: LanguageModel) -> Capability:
    """Try trees, then chains, against sequential forwards; fall back to plain decoding.

    Each check compares the logits of every node with a full forward of the tokens that
    lead to it, and again after a path was kept in the cache.
    """
    from adaptspec.models import Capability

    if getattr(model.model, "_is_stateful", False):
        return Capability("plain", "its layers keep a state that can't be rolled back")
    failures: list[str] = []
    for level, masked in (("tree", True), ("chain", True), ("chain", False)):
        model.use_masks = masked
        tree = _branching(model) if level == "tree" else _chain(model)
        problem = _compare(model, tree)
        if problem is None:
            return Capability(
                "tree" if level == "tree" else "chain", "; ".join(failures)
            )
        kind = f"{level}s" if masked else f"{level}s without a mask"
        failures.append(f"{kind} fail: {problem}")
    model.use_masks = False
    return Capability("plain", "; ".join(failures))


def _compare(model: LanguageModel, tree: TokenTree) -> str | None:
    """What is wrong with verifying ``tree``, or None."""
    prompt = _prompt(model)
    tolerance = TOLERANCE.get(model.dtype) or _half_tolerance(model, prompt)
    try:
        cache = model.new_cache(len(prompt) + len(tree) + 4)
        model.prefill(prompt, cache)
        forward = model.verify(tree, cache)
        if cache.length < len(prompt) + len(tree):
            return "the model doesn't append to the cache"
        deepest = max(range(len(tree)), key=lambda n: (tree.depths[n], n))
        paths = [
            [*prompt, tree.tokens[0], *tree.path_tokens(n)] for n in range(len(tree))
        ]
        # One sequential forward per leaf checks every node above it.
        leaves = set(range(len(tree))) - set(tree.parents)
        for leaf in sorted(leaves):
            expected = _sequential(model, paths[leaf])
            for node in tree.ancestors()[leaf]:
                row = len(prompt) + tree.depths[node]
                error = _distance(forward.logits[forward.rows[node]], expected[row])
                if error > tolerance:
                    return f"logits differ by {error:.2g} (relative)"
        kept = tree.ancestors()[deepest]
        cache.keep(len(prompt), kept)
        after = model.verify(TokenTree.root_only(prompt[0]), cache)
        expected = _sequential(model, [*paths[deepest], prompt[0]])
        error = _distance(after.logits[0], expected[-1])
        if error > tolerance:
            return f"logits differ by {error:.2g} after a path was kept"
    except Exception as error:  # whatever the model's forward raises is a verdict
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    return None


def _half_tolerance(model: LanguageModel, prompt: list[int]) -> float:
    """From what the same token's logits differ by between forwards of two lengths."""
    longer = _sequential(model, [*prompt, *_tokens(model, 5)])
    noise = max(
        _distance(_sequential(model, prompt[:count])[-1], longer[count - 1])
        for count in (len(prompt) // 2, len(prompt))
    )
    return min(max(HALF_TOLERANCE, NOISE_ALLOWED * noise), MOST_TOLERATED)


def _sequential(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` of one forward without any cache or mask of ours."""
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model.evaluate(input_ids=ids, use_cache=False).logits[0]
    return logits


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.float(), expected.float()
    scale = (expected - expected.mean()).norm().clamp_min(1e-9)
    distance = float((found - expected).norm() / scale)
    return distance if distance == distance else float("inf")


def _prompt(model: LanguageModel) -> list[int]:
    windows = [r.window or r.chunk or 0 for r in model.reaches.values()]
    longest = max((w for w in windows if w <= WIDEST_WINDOW_PROBED), default=0)
    return _tokens(model, max(PROMPT_TOKENS, longest + 3))


def _tokens(model: LanguageModel, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.vocab_size, (count,), generator=generator)
    return [int(token) for token in drawn]


def _branching(model: LanguageModel) -> TokenTree:
    a, b, c, d, e = _tokens(model, 5)
    # Two branches, the deeper one second: keeping it (0, 2, 4, 5) must move rows.
    return TokenTree((a, b, c, d, e, a), (-1, 0, 0, 1, 2, 4))


def _chain(model: LanguageModel) -> TokenTree:
    root, *rest = _tokens(model, 4)
    return TokenTree.chain(root, rest)
