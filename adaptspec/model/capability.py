"""What a model's forward can verify, found out by comparing it with itself.

The reference is the model's own ``generate``, and its forward over a whole text. What
is compared runs in float32 and crosses every window, chunk and scale the configuration
names: on the model itself where that is cheap, else on a miniature of it (see
:mod:`adaptspec.model.miniature`). The model itself then has to agree within the
noise of its own type, and its logits mustn't move with a token they can't see.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from adaptspec.errors import ModelLoadError
from adaptspec.model import miniature
from adaptspec.model.reference import (
    COMPARED_STEPS,
    MOST_TOLERATED,
    PROMPT_TOKENS,
    ROUTING_TOLERANCE,
    TOLERANCE,
    generated,
    in_one_line,
    logit_distance,
    random_tokens,
    room,
    short_length,
    tolerance_of,
    whole_logits,
)
from adaptspec.model.views import told_of
from adaptspec.token_tree import TokenTree

if TYPE_CHECKING:
    from adaptspec.model.forward import Capability, Forward, ForwardModel

GLANCE_TOKENS = 5
NODES, DEPTH = 48, 10  # of the tree for a thorough look
BRIEF_PARENTS = (-1, 0, 0, 1, 2, 4)  # the deeper branch second: keeping it moves rows

THOROUGH_PARAMETERS = (
    2e7  # parameters up to which the model itself is looked at thoroughly
)
QUICKLY_CROSSED, MOST_CROSSED = 128, 1024  # tokens of a window: at ease, at most
# Work of a thorough look where there is no choice: parameters times tokens read.
AFFORDABLE_PARAMETER_TOKENS = 4e9


@dataclass(frozen=True)
class Way:
    """One way to decode, tried in turn."""

    level: Literal["tree", "chain", "plain"]
    masked: bool = False
    uncached: bool = False

    def __str__(self) -> str:
        if self.level == "plain":
            return "whole texts without a cache" if self.uncached else "its own caches"
        return f"{self.level}s" if self.masked else f"{self.level}s without masks"


WAYS = (
    Way("tree", masked=True),
    Way("chain", masked=True),
    Way("chain"),
    Way("plain"),
    Way("plain", uncached=True),
)


@torch.inference_mode()
def probe(model: ForwardModel) -> Capability:
    """Try trees, then chains, then the model's own cache, then no cache at all.

    Raises:
        ModelLoadError: if the model isn't causal, or none of these gives what its own
            ``generate`` computes.
    """
    from adaptspec.model.forward import Capability

    subject, unseen = _subject(model)
    rounded = model.unverifiable
    _check_causal(subject or model, rounded is not None and subject in (None, model))
    reasons: list[str] = []
    failed: dict[str, list[str]] = {}  # problem -> the ways that have it
    first = 0
    if getattr(model.model, "_is_stateful", False):
        first = 3
        reasons.append("its layers keep a state that can't be rolled back")
    for obstacle in (rounded, unseen):
        if obstacle and first < 3:
            first = 3
            reasons.append(obstacle)
    for place in range(first, len(WAYS)):
        way = WAYS[place]
        if subject is None:
            problem = _brief(model, way)
        else:
            problem = _thorough(subject, way)
            if problem is None and subject is not model:
                problem = _glance(model, way)
        if problem is None:
            model.use_masks = way.masked
            told = [f"{', '.join(ways)} fail: {why}" for why, ways in failed.items()]
            return Capability(way.level, "; ".join([*reasons, *told]), way.uncached)
        failed.setdefault(problem, []).append(str(way))
    raise ModelLoadError(
        f"{model.name} can't be decoded as its own generate does: {way} fail: {problem}"
        f"{told_of(model.model)}"
    )


def _subject(model: ForwardModel) -> tuple[ForwardModel | None, str | None]:
    """What to look at thoroughly, and what can't be seen on anything at hand."""
    size = model.parameter_count
    named = miniature.boundaries(model.config)
    name = max(named, key=lambda n: named[n], default="")
    longest = named.get(name, 0)
    exact = model.dtype in TOLERANCE
    if exact and size <= THOROUGH_PARAMETERS and longest <= QUICKLY_CROSSED:
        return model, None
    small = _miniature(model)
    if small is not None:
        return small, None
    if longest <= MOST_CROSSED and not exact and size <= THOROUGH_PARAMETERS:
        copied = _exact_copy(model)
        if copied is not None:
            return copied, None
    if (
        longest <= MOST_CROSSED
        and size * max(2 * longest, NODES) <= AFFORDABLE_PARAMETER_TOKENS
    ):
        return model, None
    if not named:
        return None, None
    return None, (
        f"its {name} of {longest} is too long to be crossed in a test, and no smaller "
        f"{type(model.model).__name__} could be built"
    )


def _exact_copy(model: ForwardModel) -> ForwardModel | None:
    """The model itself in float32, None if its modules can't be converted."""
    try:
        copied = copy.deepcopy(model.model).float()
        exact = model.over(copied)
        whole_logits(exact, [random_tokens(exact, short_length(exact))])
    except Exception:  # packed or quantised weights, a module that can't be copied
        return None
    return exact


def _miniature(model: ForwardModel) -> ForwardModel | None:
    made = miniature.build(model.model, model.config)
    if made is None:
        return None
    try:
        small = model.over(made)
        whole_logits(small, [random_tokens(small, PROMPT_TOKENS)])
    except Exception:  # built, but its forward doesn't run: it tells nothing
        return None
    return small


def _thorough(model: ForwardModel, way: Way) -> str | None:
    """What is wrong with ``way`` at any length where something may change."""
    for length in _lengths(model):
        prompt = random_tokens(model, length)
        problem = _disagreement(model, prompt) if way.level != "plain" else None
        problem = problem or _try(model, way, prompt, _wide(model, way, length))
        if problem is not None:
            return problem
    return None


def _brief(model: ForwardModel, way: Way) -> str | None:
    """The same for one short prompt and a small tree."""
    prompt = random_tokens(model, short_length(model))
    return _try(model, way, prompt, _narrow(model, way))


def _glance(model: ForwardModel, way: Way) -> str | None:
    """Whether the model itself, in its own type, is anywhere near its whole forward,
    or where it decodes token by token, near its ``generate``.

    A few forwards of few tokens: what another model of the class can't show is a module
    that was replaced, packed or quantised, and a type that overflows.
    """
    prompt, tree = (
        random_tokens(model, min(GLANCE_TOKENS, short_length(model))),
        _narrow(model, way),
    )
    try:
        if way.level == "plain":
            errors = _plain_errors(model, way, prompt)
        else:
            # One token is multiplied by other kernels than several, quantised or not.
            exact = model.dtype in TOLERANCE
            if exact and (problem := _disagreement(model, prompt)):
                return problem
            model.use_masks = way.masked
            cache = model.new_cache(len(prompt) + len(tree))
            model.prefill(prompt, cache)
            errors = _errors(model, tree, prompt, model.forward_tree(tree, cache))
    except Exception as error:
        return in_one_line(error)
    # Rounding moves a few rows a lot, a fault moves most of them.
    typical = sorted(errors)[len(errors) // 2]
    if typical > TOLERANCE.get(model.dtype, MOST_TOLERATED) or math.isinf(max(errors)):
        return f"logits differ by {typical:.2g} (relative)"
    return None


def _try(
    model: ForwardModel, way: Way, prompt: list[int], tree: TokenTree
) -> str | None:
    """What is wrong, or None; whatever the model's forward raises is a verdict too."""
    try:
        if way.level == "plain":
            return _plain(model, way, prompt)
        model.use_masks = way.masked
        return _compare(model, tree, prompt)
    except Exception as error:
        return in_one_line(error)


def _compare(model: ForwardModel, tree: TokenTree, prompt: list[int]) -> str | None:
    """What is wrong with verifying ``tree`` behind ``prompt``, or None."""
    tolerance = tolerance_of(model, prompt)
    cache = model.new_cache(len(prompt) + len(tree) + 4)
    model.prefill(prompt, cache)
    forward = model.forward_tree(tree, cache)
    if cache.length < len(prompt) + len(tree):
        return "the model doesn't append to the cache"
    found = [forward.logits[forward.rows[node]].clone() for node in range(len(tree))]
    error = max(_errors(model, tree, prompt, forward))
    if error > tolerance:
        return f"logits differ by {error:.2g} (relative)"
    if problem := _leak(model, tree, prompt, cache, found, tolerance):
        return problem
    deepest = max(range(len(tree)), key=lambda n: (tree.depths[n], n))
    kept = tree.ancestors()[deepest]
    cache.keep(len(prompt), kept)
    after = model.forward_tree(TokenTree.root_only(prompt[0]), cache)
    text = [*prompt, *(tree.tokens[node] for node in kept), prompt[0]]
    expected = whole_logits(model, [text])
    error = logit_distance(after.logits[0], expected[0][-1])
    if error > tolerance:
        return f"logits differ by {error:.2g} after a path was kept"
    return None


def _errors(
    model: ForwardModel, tree: TokenTree, prompt: list[int], forward: Forward
) -> list[float]:
    """How far each node's logits are from those of the text that leads to it."""
    lines = tree.ancestors()
    # One sequential forward per leaf checks every node above it.
    leaves = sorted(set(range(len(tree))) - set(tree.parents))
    texts = [[*prompt, *(tree.tokens[n] for n in lines[leaf])] for leaf in leaves]
    errors = [0.0] * len(tree)
    for leaf, logits in zip(leaves, whole_logits(model, texts), strict=True):
        for node in lines[leaf]:
            expected = logits[len(prompt) + tree.depths[node]]
            error = logit_distance(forward.logits[forward.rows[node]], expected)
            errors[node] = max(errors[node], error)
    return errors


def _leak(
    model: ForwardModel,
    tree: TokenTree,
    prompt: list[int],
    cache: Any,
    before: Sequence[torch.Tensor],
    tolerance: float,
) -> str | None:
    """Whether a node's logits move with a token that isn't among its ancestors.

    Both forwards have one shape, so whatever rounding does it does to both: this tells
    in half precision, too. Experts alone are given other rows by other tokens.
    """
    node = _last_branch(tree)
    if node is None:
        return None
    cache.truncate(len(prompt))
    tokens = list(tree.tokens)
    tokens[node] = (tokens[node] + 7) % model.vocab_size
    forward = model.forward_tree(TokenTree(tokens, tree.parents), cache)
    experts = miniature.has_experts(model.config)
    for other, line in enumerate(tree.ancestors()):
        if node in line:
            continue
        error = logit_distance(forward.logits[forward.rows[other]], before[other])
        if error > (tolerance if experts else ROUTING_TOLERANCE):
            return "the logits of a node move with another branch's token"
    cache.truncate(len(prompt))
    model.forward_tree(tree, cache)
    return None


def _last_branch(tree: TokenTree) -> int | None:
    """A node with others beside or behind it that don't descend from it."""
    nodes = range(1, len(tree))
    lines = tree.ancestors()
    counts = {n: sum(n not in line for line in lines[n + 1 :]) for n in nodes}
    if not counts:
        return None
    best = max(counts, key=lambda n: counts[n])
    return best if counts[best] else max(nodes)


def _plain(model: ForwardModel, way: Way, prompt: list[int]) -> str | None:
    """What is wrong with decoding one token at a time."""
    tolerance = tolerance_of(model, prompt)
    for step, error in enumerate(_plain_errors(model, way, prompt)):
        if error > tolerance:
            return f"logits differ by {error:.2g} (relative) at token {step + 1}"
    return None


def _plain_errors(model: ForwardModel, way: Way, prompt: list[int]) -> list[float]:
    """How far logits are from those of ``generate``, token by token."""
    tokens, expected = generated(model, prompt)
    cache = model.plain_cache(uncached=way.uncached)
    errors = []
    given = prompt
    for step, logits in enumerate(expected):
        forward = model.prefill(given, cache)
        errors.append(logit_distance(forward.logits[-1], logits))
        given = [tokens[step]]
    return errors


def _disagreement(model: ForwardModel, prompt: list[int]) -> str | None:
    """How the logits of ``generate`` differ from those of one forward, or None."""
    try:
        tokens, logits = generated(model, prompt)
        whole = whole_logits(model, [[*prompt, *tokens]])[0][len(prompt) - 1 :]
    except Exception as error:
        return in_one_line(error)
    for step, row in enumerate(logits):
        moved = logit_distance(row, whole[step])
        if moved > tolerance_of(model, prompt):
            return f"its generate differs by {moved:.2g} at token {step + 1}"
    return None


def _check_causal(model: ForwardModel, rounded: bool) -> None:
    """Raise unless what a token gives is settled by the tokens up to it.

    Args:
        rounded: Whether tokens of one pass may move each other's logits anyway.
    """
    tokens = random_tokens(model, short_length(model))
    other = [*tokens[:-1], (tokens[-1] + 7) % model.vocab_size]
    try:
        first, second = (whole_logits(model, [ids])[0] for ids in (tokens, other))
    except Exception as error:
        raise ModelLoadError(
            f"{model.name} doesn't run: {in_one_line(error)} (a decoder that takes "
            f"token ids alone is expected{told_of(model.model)})"
        ) from error
    pairs = zip(first[:-1], second[:-1], strict=True)
    moved = max(logit_distance(a, b) for a, b in pairs)
    routed = rounded or miniature.has_experts(model.config)
    if moved > (MOST_TOLERATED if routed else ROUTING_TOLERANCE):
        raise ModelLoadError(
            f"{model.name} isn't a causal language model: its logits at a token change "
            "with the tokens after it; load a decoder-only model (an encoder such as "
            "BERT needs is_decoder=True and weights trained for it)"
            f"{told_of(model.model)}"
        )


def _lengths(model: ForwardModel) -> list[int]:
    """Prompts that end just before each boundary, and some far behind all."""
    bounds = sorted(set(miniature.boundaries(model.config).values()))
    lengths = {short_length(model)}
    if bounds:
        lengths |= {bound - 3 for bound in bounds if bound > PROMPT_TOKENS}
        lengths |= {bounds[-1] + 3, 2 * bounds[-1] - 3}
    return sorted(n for n in lengths if 1 <= n <= room(model) - 2 * COMPARED_STEPS)


def _wide(model: ForwardModel, way: Way, length: int) -> TokenTree:
    """A random tree as wide and deep as strategies propose, or a chain as long."""
    draw = random.Random(length)
    nodes = max(1, min(NODES, room(model) - length - COMPARED_STEPS))
    if way.level == "chain":
        root, *rest = random_tokens(model, min(nodes, DEPTH + 1))
        return TokenTree.chain(root, rest)
    parents, depths = [-1], [0]
    while len(parents) < nodes:
        parent = draw.choice([*range(max(0, len(parents) - 6), len(parents)), 0])
        if depths[parent] < DEPTH:
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return TokenTree(random_tokens(model, nodes), parents)


def _narrow(model: ForwardModel, way: Way) -> TokenTree:
    if way.level == "chain":
        root, *rest = random_tokens(model, 4)
        return TokenTree.chain(root, rest)
    return TokenTree(random_tokens(model, len(BRIEF_PARENTS)), BRIEF_PARENTS)
