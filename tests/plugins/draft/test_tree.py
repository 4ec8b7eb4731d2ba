"""The tree drafters against EAGLE-2 written naively, and sampled trees by frequency."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.model.forward import Capability
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Target
from adaptspec.testing.strategies import chi_square, toy_distribution
from adaptspec.token_tree import Drawn, TokenTree
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.draft.tree import DraftTree, DraftTreeParams, expected_shape

BuildModel = Callable[..., LanguageModel]
FreshLogits = Callable[[LanguageModel, list[int]], torch.Tensor]
Path = tuple[int, ...]
SEEDS = range(400)
HOT = 4.0  # flattens the tiny models' distributions, so that all outcomes count


def start(
    target: LanguageModel, draft: LanguageModel, controls: Controls, **params: Any
) -> Drafter:
    sampler = Sampler(Processors(controls, 1, target.device), controls.seed)
    strategy = DraftTree(DraftTreeParams(**params))
    return strategy.start(Target(target, draft, None, (), sampler, True, perf_counter))


def paths(tree: TokenTree) -> set[Path]:
    return {tuple(tree.path_tokens(node)) for node in range(1, len(tree))}


def naive_tree(
    probs: Callable[[Path], torch.Tensor],
    draft_length: int,
    speculation_depth: int,
    top_k: int,
    stop: float,
) -> set[Path]:
    """EAGLE-2: expand the best top_k of each level, rank everything at the end."""
    values: dict[Path, float] = {}
    frontier: list[Path] = [()]
    for _ in range(speculation_depth):
        fresh = []
        for path in frontier:
            before = values.get(path, 0.0)
            top = probs(path).topk(top_k)
            for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                if p > 0:
                    fresh.append((*path, token))
                    values[fresh[-1]] = before + math.log(p)
        alive = [path for path in fresh if math.exp(values[path]) >= stop]
        frontier = sorted(alive, key=lambda path: -values[path])[:top_k]
    return set(sorted(values, key=lambda path: -values[path])[:draft_length])


@pytest.mark.parametrize(
    "params",
    [
        {"draft_length": 12, "speculation_depth": 4, "top_k": 3, "stop": 0.0},
        {"draft_length": 40, "speculation_depth": 3, "top_k": 4, "stop": 0.0},
        {"draft_length": 5, "speculation_depth": 6, "top_k": 4, "stop": 0.0},
        {"draft_length": 30, "speculation_depth": 4, "top_k": 3, "stop": 0.2},
    ],
)
@pytest.mark.parametrize("controls", [Controls(), Controls(temperature=0.7, top_k=3)])
def test_the_tree_is_eagle_2s_drafted_from_scratch(
    target: LanguageModel,
    draft: LanguageModel,
    fresh_logits: FreshLogits,
    prompt: list[int],
    params: dict[str, Any],
    controls: Controls,
) -> None:
    drafter = start(target, draft, controls, **params)
    ids = list(prompt)
    for step in range(4):
        tree = drafter.propose(Context(ids, 50, 128, step))
        tree.check(ids[-1], 64)

        def probs(path: Path, ids: tuple[int, ...] = tuple(ids)) -> torch.Tensor:
            logits = fresh_logits(draft, [*ids, *path])
            if controls.temperature == 0:
                return logits.softmax(-1)
            kept = logits.topk(3)
            cold = (kept.values / controls.temperature).softmax(-1)
            return torch.zeros_like(logits).scatter(0, kept.indices, cold)

        assert tree.drawn is Drawn.DETERMINISTIC
        assert paths(tree) == naive_tree(probs, **params)
        # Commit one of its paths in part, and something the draft didn't say.
        ids += [*tree.path_tokens(len(tree) - 1)[: step + 1], 63 - step]


@pytest.mark.parametrize(
    ("mode", "temperature"),
    [("deterministic", 0.0), ("deterministic", 0.8), ("sampled", 0.8)],
)
def test_the_draft_cache_is_in_step_after_any_path_and_nothing_is_fed_twice(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    checked_drafts: Any,
    mode: str,
    temperature: float,
) -> None:
    params = DraftTreeParams.parse(
        {"mode": mode, "speculation_depth": 4, "draft_length": 14}
    )
    controls = Controls(max_new_tokens=40, temperature=temperature, seed=5)
    stats = Engine(target, draft).generate(DraftTree(params), prompt, controls).stats
    accepted = {step.accepted for step in stats.steps}
    assert len(accepted) > 1
    assert max(accepted) >= 3
    assert checked_drafts.compared > 2 * len(stats.steps)
    assert checked_drafts.fed[0] == len(prompt) + 1
    assert max(checked_drafts.fed[1:]) <= 2  # a leaf never expanded, and the bonus


def test_the_path_of_likeliest_tokens_stands_first_so_that_keeping_it_copies_nothing(
    target: LanguageModel, draft: LanguageModel, prompt: list[int]
) -> None:
    drafter = start(
        target,
        draft,
        Controls.greedy(50),
        draft_length=12,
        speculation_depth=4,
        top_k=3,
    )
    tree = drafter.propose(Context(prompt, 50, 128, 0))
    node, chain = 0, [0]
    while tree.children[node]:
        node = tree.children[node][0]
        chain.append(node)
    assert chain == list(range(len(chain)))
    assert 1 < len(chain) < len(tree)


def test_deterministic_trees_emit_plain_samplings_tokens(
    target: LanguageModel, draft: LanguageModel, prompt: list[int]
) -> None:
    controls = Controls(max_new_tokens=30, temperature=0.9, top_p=0.95, seed=11)
    run = Engine(target, draft).generate(DraftTree(), prompt, controls)
    plain = Engine(target).generate(Autoregressive(), prompt, controls)
    assert run.token_ids == plain.token_ids
    assert run.stats.accepted > 0


def test_greedy_decoding_of_sampled_trees_drafts_the_likeliest_tokens(
    target: LanguageModel, draft: LanguageModel, prompt: list[int]
) -> None:
    context = Context(prompt, 50, 128, 0)
    trees = [
        start(target, draft, Controls.greedy(50), mode=mode).propose(context)
        for mode in ("sampled", "deterministic")
    ]
    assert trees[0] == trees[1]


class Pretended(DraftTree):
    """Takes the likeliest tokens but claims to have drawn them."""

    name = "pretended"

    def start(self, target: Target) -> Drafter:
        honest = super().start(target)

        class Likeliest(Drafter):
            def propose(self, context: Context) -> TokenTree:
                tree = honest.propose(context)
                tokens = list(tree.tokens)
                for children in tree.children:
                    for rank, child in enumerate(children):
                        order = tree.draft_probs[child].argsort(descending=True)
                        tokens[child] = int(order[rank])
                return TokenTree(tokens, tree.parents, tree.drawn, tree.draft_probs)

        return Likeliest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "params", "exact"),
    [
        (DraftTree, {"draft_length": 6, "speculation_depth": 2, "top_k": 3}, True),
        (
            DraftTree,
            {"draft_length": 6, "speculation_depth": 2, "top_k": 3, "stop": 0.4},
            True,
        ),
        (Pretended, {"draft_length": 2, "speculation_depth": 2, "top_k": 1}, False),
    ],
    ids=["drawn", "expanding only the likely", "negative control"],
)
def test_sampled_trees_leave_the_targets_distribution(
    llama: BuildModel,
    cls: type[DraftTree],
    params: dict[str, Any],
    exact: bool,
) -> None:
    target = llama(vocab_size=5, layers=1)
    engine = Engine(target, llama(vocab_size=5, layers=1, noise=0.5))
    strategy = cls(DraftTreeParams.parse({**params, "mode": "sampled"}))
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in SEEDS:
        controls = Controls(max_new_tokens=4, temperature=HOT, seed=seed)
        run = engine.generate(strategy, [1, 2], controls)
        counts[tuple(run.token_ids[1:3])] += 1
    p_value = chi_square(counts, toy_distribution(target, [1, 2], HOT))
    assert p_value > 1e-3 if exact else p_value < 1e-6


def test_a_sampled_tree_carries_the_distribution_of_each_draw_without_repeats(
    target: LanguageModel, draft: LanguageModel, fresh_logits: FreshLogits, prompt: Any
) -> None:
    controls = Controls(temperature=1.0, seed=2)
    drafter = start(
        target, draft, controls, mode="sampled", draft_length=20, speculation_depth=3
    )
    tree = drafter.propose(Context(prompt, 50, 128, 0))
    tree.check(prompt[-1], 64)
    assert tree.drawn is Drawn.WITHOUT_REPLACEMENT
    assert tree.proposed == 20
    for node in range(1, len(tree)):
        before = tree.path_tokens(node)[:-1]
        expected = fresh_logits(draft, [*prompt, *before]).softmax(-1)
        torch.testing.assert_close(
            tree.draft_probs[node], expected, atol=1e-4, rtol=1e-4
        )


@cache
def best_accepted(nodes: int, depth: int, ranks: int, first: float) -> float:
    """Most expected accepted tokens below a node, by Sequoia's dynamic programme.

    ``ranks`` siblings may still be added, each reached if the ones before failed.
    """
    if nodes == 0 or depth == 0 or ranks == 0:
        return 0.0
    return max(
        first * (1 + best_accepted(below, depth - 1, TOP_K, first))
        + (1 - first) * best_accepted(nodes - 1 - below, depth, ranks - 1, first)
        for below in range(nodes)
    )


TOP_K = 3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 14), st.integers(1, 4), st.floats(0.2, 0.9))
def test_the_shape_gives_the_most_expected_accepted_tokens(
    nodes: int, depth: int, first: float
) -> None:
    shape = expected_shape(nodes, depth, TOP_K, first)

    def accepted(place: int, level: int) -> float:
        assert level < depth or not shape[place]
        return sum(
            first * (1 - first) ** rank * (1 + accepted(child, level + 1))
            for rank, child in enumerate(shape[place])
        )

    assert len(shape) <= nodes + 1
    assert accepted(0, 0) == pytest.approx(best_accepted(nodes, depth, TOP_K, first))


@pytest.mark.parametrize(("room", "nodes"), [(1, 99), (2, 99), (3, 99), (50, 2)])
@pytest.mark.parametrize("mode", ["deterministic", "sampled"])
def test_no_deeper_than_the_room_left_and_no_more_than_can_be_verified(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    mode: str,
    room: int,
    nodes: int,
) -> None:
    drafter = start(target, draft, Controls(temperature=1.0, seed=0), mode=mode)
    tree = drafter.propose(Context(prompt, room, nodes, 0))
    assert max(tree.depths) == min(5, room - 1, nodes)
    assert tree.proposed <= nodes


def test_a_draft_model_without_tree_attention_is_refused_with_its_reason(
    target: LanguageModel, llama: BuildModel
) -> None:
    chain_only = llama(noise=0.1)
    chain_only.__dict__["capability"] = Capability("chain", "no masks here")
    reason = DraftTree.unavailable(target, chain_only)
    assert reason == "the draft model can't draft trees: no masks here"
    assert DraftTree.unavailable(target, target) is None
