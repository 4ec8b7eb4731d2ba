"""What a model's forward can verify, found out by comparing it with itself.

The reference is the model's own ``generate``, and its forward over a whole text. What
is compared runs in float32 and crosses every window, chunk and scale the configuration
names: on the model itself where that is cheap, else on a miniature of it (see
:mod:`adaptspec.model.miniature`). The model itself then has to agree within the
noise of its own type, and its logits mustn't move with a token they can't see.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from adaptspec.errors import ModelLoadError
from adaptspec.model import miniature
from adaptspec.model.rotary import switching_lengths
from adaptspec.token_tree import TokenTree

if TYPE_CHECKING:
    from adaptspec.model.forward import Capability, Forward, ForwardModel

PROMPT_TOKENS = 12
GLANCE_TOKENS = 5
COMPARED_STEPS = 4  # of generate
NODES, DEPTH = 48, 10  # of the tree for a thorough look
BRIEF_PARENTS = (-1, 0, 0, 1, 2, 4)  # the deeper branch second: keeping it moves rows

THOROUGH_PARAMETERS = (
    2e7  # parameters up to which the model itself is looked at thoroughly
)
QUICKLY_CROSSED, MOST_CROSSED = 128, 1024  # tokens of a window: at ease, at most
# Work of a thorough look where there is no choice: parameters times tokens read.
AFFORDABLE_PARAMETER_TOKENS = 4e9

# Relative error of logits that rounding explains; a wrong mask or position gives more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
# In half precision rounding alone moves logits; how far is measured on the model.
HALF_TOLERANCE = 0.1
NOISE_ALLOWED = 3.0
MOST_TOLERATED = 0.4
# One forward twice with other tokens elsewhere: nothing but routing may move a bit.
ROUTING_TOLERANCE = 1e-5


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
    _check_causal(subject or model)
    reasons: list[str] = []
    failed: dict[str, list[str]] = {}  # problem -> the ways that have it
    first = 0
    if getattr(model.model, "_is_stateful", False):
        first = 3
        reasons.append("its layers keep a state that can't be rolled back")
    if unseen and first < 3:
        first = 3
        reasons.append(unseen)
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
        _whole(exact, [_tokens(exact, _short(exact))])
    except Exception:  # packed or quantised weights, a module that can't be copied
        return None
    return exact


def _miniature(model: ForwardModel) -> ForwardModel | None:
    made = miniature.build(model.model, model.config)
    if made is None:
        return None
    try:
        small = model.over(made)
        _whole(small, [_tokens(small, PROMPT_TOKENS)])
    except Exception:  # built, but its forward doesn't run: it tells nothing
        return None
    return small


def _thorough(model: ForwardModel, way: Way) -> str | None:
    """What is wrong with ``way`` at any length where something may change."""
    for length in _lengths(model):
        prompt = _tokens(model, length)
        problem = _disagreement(model, prompt) if way.level != "plain" else None
        problem = problem or _try(model, way, prompt, _wide(model, way, length))
        if problem is not None:
            return problem
    return None


def _brief(model: ForwardModel, way: Way) -> str | None:
    """The same for one short prompt and a small tree."""
    prompt = _tokens(model, _short(model))
    return _try(model, way, prompt, _narrow(model, way))


def _glance(model: ForwardModel, way: Way) -> str | None:
    """Whether the model itself, in its own type, is anywhere near its whole forward.

    A few forwards of few tokens: what another model of the class can't show is a module
    that was replaced, packed or quantised, and a type that overflows.
    """
    prompt, tree = (
        _tokens(model, min(GLANCE_TOKENS, _short(model))),
        _narrow(model, way),
    )
    try:
        if way.level == "plain":
            plain = model.plain_cache(uncached=way.uncached)
            found = [
                model.prefill(given, plain).logits[-1]
                for given in (prompt, [prompt[0]])
            ]
            whole = _whole(model, [[*prompt, prompt[0]]])[0][-2:]
            errors = [_distance(*pair) for pair in zip(found, whole, strict=True)]
        else:
            model.use_masks = way.masked
            cache = model.new_cache(len(prompt) + len(tree))
            model.prefill(prompt, cache)
            errors = _errors(model, tree, prompt, model.forward_tree(tree, cache))
    except Exception as error:
        return _told(error)
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
        return _told(error)


def _compare(model: ForwardModel, tree: TokenTree, prompt: list[int]) -> str | None:
    """What is wrong with verifying ``tree`` behind ``prompt``, or None."""
    tolerance = _tolerance(model, prompt)
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
    expected = _whole(model, [text])
    error = _distance(after.logits[0], expected[0][-1])
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
    for leaf, logits in zip(leaves, _whole(model, texts), strict=True):
        for node in lines[leaf]:
            expected = logits[len(prompt) + tree.depths[node]]
            error = _distance(forward.logits[forward.rows[node]], expected)
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
        error = _distance(forward.logits[forward.rows[other]], before[other])
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
    tokens, expected = _generated(model, prompt)
    cache = model.plain_cache(uncached=way.uncached)
    tolerance = _tolerance(model, prompt)
    given = prompt
    for step, logits in enumerate(expected):
        forward = model.prefill(given, cache)
        error = _distance(forward.logits[-1], logits)
        if error > tolerance:
            return f"logits differ by {error:.2g} (relative) at token {step + 1}"
        given = [tokens[step]]
    return None


def _disagreement(model: ForwardModel, prompt: list[int]) -> str | None:
    """How the logits of ``generate`` differ from those of one forward, or None."""
    try:
        tokens, logits = _generated(model, prompt)
        whole = _whole(model, [[*prompt, *tokens]])[0][len(prompt) - 1 :]
    except Exception as error:
        return _told(error)
    for step, row in enumerate(logits):
        distance = _distance(row, whole[step])
        if distance > _tolerance(model, prompt):
            return f"its generate differs by {distance:.2g} at token {step + 1}"
    return None


def _generated(
    model: ForwardModel, prompt: list[int]
) -> tuple[list[int], list[torch.Tensor]]:
    """A few tokens of the model's own ``generate``, and the logits they are from.

    A model without ``generate``, or whose own raises, is taken at its whole forward.
    """
    from transformers import GenerationConfig

    module: Any = model.model
    stored = getattr(module, "generation_config", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
            output = _own_generate(module)(
                torch.tensor([prompt], device=model.device),
                attention_mask=torch.ones((1, len(prompt)), device=model.device).long(),
                max_new_tokens=COMPARED_STEPS,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = [rows[0] for rows in output.logits]
        return [int(token) for token in output.sequences[0, len(prompt) :]], logits
    except Exception:
        tokens: list[int] = []
        logits = []
        for _ in range(COMPARED_STEPS):
            logits.append(_whole(model, [[*prompt, *tokens]])[0][-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens, logits
    finally:
        if stored is not None:
            module.generation_config = stored


def _own_generate(module: Any) -> Callable[..., Any]:
    """That of its class: on the object itself it may be bound to a decoder."""
    own = getattr(type(module), "generate", None)
    return module.generate if own is None else functools.partial(own, module)


def _check_causal(model: ForwardModel) -> None:
    """Raise unless what a token gives is settled by the tokens up to it."""
    tokens = _tokens(model, _short(model))
    other = [*tokens[:-1], (tokens[-1] + 7) % model.vocab_size]
    try:
        first, second = (_whole(model, [ids])[0] for ids in (tokens, other))
    except Exception as error:
        raise ModelLoadError(
            f"{model.name} doesn't run: {_told(error)} (a decoder that takes token "
            "ids alone is expected)"
        ) from error
    moved = max(_distance(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
    experts = miniature.has_experts(model.config)
    if moved > (MOST_TOLERATED if experts else ROUTING_TOLERANCE):
        raise ModelLoadError(
            f"{model.name} isn't a causal language model: its logits at a token change "
            "with the tokens after it; load a decoder-only model (an encoder such as "
            "BERT needs is_decoder=True and weights trained for it)"
        )


def _tolerance(model: ForwardModel, prompt: list[int]) -> float:
    exact = TOLERANCE.get(model.dtype)
    if exact is not None:
        return exact
    # What the same token's logits differ by between forwards of two lengths.
    longer = _whole(model, [[*prompt, *_tokens(model, 5)]])[0]
    noise = max(
        _distance(_whole(model, [prompt[:count]])[0][-1], longer[count - 1])
        for count in (len(prompt) // 2, len(prompt))
    )
    return min(max(HALF_TOLERANCE, NOISE_ALLOWED * noise), MOST_TOLERATED)


def _whole(model: ForwardModel, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits ``[tokens, vocab]`` of each text, in one forward without cache or mask.

    Shorter texts are filled up behind their end, where a causal model can't look.
    """
    longest = max(map(len, texts))
    rows = [[*text, *([text[-1]] * (longest - len(text)))] for text in texts]
    ids = torch.tensor(rows, device=model.device)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if model.takes_positions:  # as generate does: some count them from elsewhere
        places = torch.arange(longest, device=model.device)
        given["position_ids"] = places.expand(len(rows), longest)
    logits = model.evaluate(**given).logits
    return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of logits; infinite where other ones aren't finite numbers."""
    found, expected = found.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    found, expected = found[finite], expected[finite]
    scale = (expected - expected.mean()).norm().clamp_min(1e-9)
    return float((found - expected).norm() / scale) if finite.any() else 0.0


def _lengths(model: ForwardModel) -> list[int]:
    """Prompts that end just before each boundary, and some far behind all."""
    bounds = sorted(set(miniature.boundaries(model.config).values()))
    lengths = {_short(model)}
    if bounds:
        lengths |= {bound - 3 for bound in bounds if bound > PROMPT_TOKENS}
        lengths |= {bounds[-1] + 3, 2 * bounds[-1] - 3}
    return sorted(n for n in lengths if 1 <= n <= _room(model) - 2 * COMPARED_STEPS)


def _short(model: ForwardModel) -> int:
    return max(1, min(PROMPT_TOKENS, _room(model) // 2))


def _room(model: ForwardModel) -> int:
    """Positions there are, up to the first at which a rotation switches."""
    switches = switching_lengths(model.config)
    return min([miniature.configured_length(model.config) or 1 << 30, *switches])


def _tokens(model: ForwardModel, count: int) -> list[int]:
    """Random tokens; the lowest ids and padding, which mean something, are left out."""
    generator = torch.Generator().manual_seed(0)
    first = min(4, model.vocab_size // 2)
    drawn = torch.randint(first, model.vocab_size, (count,), generator=generator)
    padding = getattr(model.config, "pad_token_id", None)
    return [int(t) if int(t) != padding else first - 1 for t in drawn]


def _wide(model: ForwardModel, way: Way, length: int) -> TokenTree:
    """A random tree as wide and deep as strategies propose, or a chain as long."""
    draw = random.Random(length)
    nodes = max(1, min(NODES, _room(model) - length - COMPARED_STEPS))
    if way.level == "chain":
        root, *rest = _tokens(model, min(nodes, DEPTH + 1))
        return TokenTree.chain(root, rest)
    parents, depths = [-1], [0]
    while len(parents) < nodes:
        parent = draw.choice([*range(max(0, len(parents) - 6), len(parents)), 0])
        if depths[parent] < DEPTH:
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return TokenTree(_tokens(model, nodes), parents)


def _narrow(model: ForwardModel, way: Way) -> TokenTree:
    if way.level == "chain":
        root, *rest = _tokens(model, 4)
        return TokenTree.chain(root, rest)
    return TokenTree(_tokens(model, len(BRIEF_PARENTS)), BRIEF_PARENTS)


def _told(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
