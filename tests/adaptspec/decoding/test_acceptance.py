"""Acceptance rules enumerated exactly over a toy vocabulary, and counted."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.decoding.acceptance import (
    Typical,
    accept_matching,
    accept_sampled,
    accept_typical,
    residual,
)
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.strategy import Context
from adaptspec.testing.fakes import ScriptedStrategy
from adaptspec.testing.strategies import fits, toy_distribution, toy_pair
from adaptspec.token_tree import Drawn, TokenTree

VOCAB = 4


@st.composite
def distributions(draw: st.DrawFn, sparse: bool = True) -> torch.Tensor:
    """A distribution over the toy vocabulary, zeros among it, in float64."""
    weights = draw(
        st.lists(
            st.integers(0 if sparse else 1, 20), min_size=VOCAB, max_size=VOCAB
        ).filter(any)
    )
    distribution = torch.tensor(weights, dtype=torch.float64)
    return distribution / distribution.sum()


def emitted_distribution(tree: TokenTree, target: torch.Tensor) -> torch.Tensor:
    """The exact distribution of the first token emitted for one proposal.

    Each acceptance test is split at its threshold, which bisection finds, so the rule
    under test is a black box.
    """
    found = torch.zeros(VOCAB, dtype=torch.float64)

    def explore(fixed: list[float], weight: float) -> None:
        """Fix the answers so far; split the next test at its threshold."""
        leftover: list[torch.Tensor] = []

        def uniform(depth: int, attempt: int) -> float:
            if attempt < len(fixed):
                return fixed[attempt]
            raise Asked

        def pick(probs: torch.Tensor, depth: int) -> int:
            leftover.append(probs / probs.sum())
            return 0

        try:
            accepted = accept_sampled(tree, lambda node, tokens: target, uniform, pick)
        except Asked:
            threshold = split(fixed)
            if threshold > 0:
                explore([*fixed, threshold / 2], weight * threshold)
            if threshold < 1:
                explore([*fixed, (1 + threshold) / 2], weight * (1 - threshold))
            return
        if len(accepted.path) > 1:
            found[tree.tokens[accepted.path[1]]] += weight
        else:
            found.add_(leftover[0] * weight)

    def split(fixed: list[float]) -> float:
        """The probability of acceptance at the next test, by bisection."""

        def accepts(value: float) -> bool:
            def uniform(depth: int, attempt: int) -> float:
                return (
                    fixed[attempt]
                    if attempt < len(fixed)
                    else (value if attempt == len(fixed) else 1 - 1e-15)
                )

            path = accept_sampled(
                tree, lambda node, tokens: target, uniform, lambda probs, depth: 0
            ).path
            return len(path) > 1 and path[1] == tree.children[0][len(fixed)]

        low, high = 0.0, 1.0
        if not accepts(1e-15):
            return 0.0
        if accepts(1 - 1e-12):
            return 1.0
        for _ in range(45):
            middle = (low + high) / 2
            low, high = (middle, high) if accepts(middle) else (low, middle)
        return low

    explore([], 1.0)
    return found


class Asked(Exception):
    """The rule wants another uniform number."""


def siblings(tokens: Sequence[int], drawn: Drawn, draft: torch.Tensor) -> TokenTree:
    """A root and its children, all drawn from ``draft``."""
    return TokenTree(
        (0, *tokens),
        (-1, *(0 for _ in tokens)),
        drawn,
        {node: draft for node in range(1, len(tokens) + 1)},
    )


def independent_draws(
    draft: torch.Tensor, count: int
) -> Iterator[tuple[tuple[int, ...], float]]:
    for tokens in itertools.product(range(VOCAB), repeat=count):
        chance = 1.0
        for token in tokens:
            chance *= float(draft[token])
        if chance > 0:
            yield tokens, chance


def draws_without_replacement(
    draft: torch.Tensor, count: int
) -> Iterator[tuple[tuple[int, ...], float]]:
    support = [token for token in range(VOCAB) if draft[token] > 0]
    for tokens in itertools.permutations(support, min(count, len(support))):
        chance, left = 1.0, 1.0
        for token in tokens:
            chance *= float(draft[token]) / left
            left -= float(draft[token])
        yield tokens, chance


@settings(max_examples=25)
@given(distributions(), distributions(), st.integers(1, 2))
def test_independent_siblings_emit_the_targets_distribution(
    target: torch.Tensor, draft: torch.Tensor, count: int
) -> None:
    emitted = torch.zeros(VOCAB, dtype=torch.float64)
    for tokens, chance in independent_draws(draft, count):
        emitted += chance * emitted_distribution(
            siblings(tokens, Drawn.INDEPENDENT, draft), target
        )
    torch.testing.assert_close(emitted, target, rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(distributions(), distributions(), st.integers(1, 3))
def test_siblings_drawn_without_replacement_emit_the_targets_distribution(
    target: torch.Tensor, draft: torch.Tensor, count: int
) -> None:
    emitted = torch.zeros(VOCAB, dtype=torch.float64)
    for tokens, chance in draws_without_replacement(draft, count):
        tree = siblings(tokens, Drawn.WITHOUT_REPLACEMENT, draft)
        emitted += chance * emitted_distribution(tree, target)
    torch.testing.assert_close(emitted, target, rtol=0, atol=1e-6)


@settings(max_examples=25)
@given(distributions(), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3))
def test_children_without_a_distribution_are_certain_proposals_and_exact_too(
    target: torch.Tensor, tokens: list[int]
) -> None:
    tree = TokenTree((0, *tokens), (-1, *(0 for _ in tokens)), Drawn.INDEPENDENT)
    torch.testing.assert_close(
        emitted_distribution(tree, target), target, rtol=0, atol=1e-6
    )


@settings(max_examples=25)
@given(distributions(), st.sets(st.integers(0, VOCAB - 1), min_size=1))
def test_deterministic_siblings_emit_the_token_that_was_sampled(
    target: torch.Tensor, tokens: set[int]
) -> None:
    tree = TokenTree((0, *tokens), (-1, *(0 for _ in tokens)))
    for sampled in range(VOCAB):

        def choose(node: int, path: Sequence[int], sampled: int = sampled) -> int:
            return sampled if node == 0 else 0

        accepted = accept_matching(tree, choose)
        emitted = [*(tree.tokens[n] for n in accepted.path[1:]), accepted.token]
        assert emitted[0] == sampled


@given(distributions(), distributions())
def test_accepted_mass_and_residual_make_up_the_target(
    target: torch.Tensor, draft: torch.Tensor
) -> None:
    accepted = torch.minimum(target, draft)
    left = residual(target, draft, target, [])
    whole = accepted + (1 - accepted.sum()) * left
    torch.testing.assert_close(whole, target, rtol=0, atol=1e-9)


@given(distributions(), st.sets(st.integers(0, VOCAB - 1)))
def test_a_residual_that_rounding_emptied_is_still_a_distribution(
    target: torch.Tensor, tried: set[int]
) -> None:
    left = residual(target, target, target, sorted(tried))
    assert float(left.sum()) == pytest.approx(1)
    assert bool((left >= 0).all())
    untried = target.clone()
    untried[sorted(tried)] = 0
    if float(untried.sum()) > 0:
        assert float(left[sorted(tried)].sum()) == 0


def test_the_enumeration_detects_a_draft_that_lies_about_its_distribution() -> None:
    target = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    draft = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    claimed = torch.full((VOCAB,), 0.25, dtype=torch.float64)
    emitted = torch.zeros(VOCAB, dtype=torch.float64)
    for tokens, chance in independent_draws(draft, 1):
        emitted += chance * emitted_distribution(
            siblings(tokens, Drawn.INDEPENDENT, claimed), target
        )
    assert float((emitted - target).abs().sum()) > 0.05


def run_with_sampled_trees(drawn: Drawn, honest: bool, draws: int) -> bool:
    """Whether the engine's output passes a chi-square test against the exact one.

    Two siblings and below the first a further pair, drawn from a fixed distribution; a
    dishonest drafter claims another.
    """
    model, _ = toy_pair()
    prompt = [1, 4, 2]
    drawn_from = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    claimed = drawn_from if honest else torch.full((5,), 0.2)
    generator = torch.Generator().manual_seed(1)

    def script(context: Context) -> TokenTree:
        def pair() -> list[int]:
            replacement = drawn is Drawn.INDEPENDENT
            tokens = torch.multinomial(drawn_from, 2, replacement, generator=generator)
            return [int(token) for token in tokens]

        return TokenTree(
            (context.ids[-1], *pair(), *pair()),
            (-1, 0, 0, 1, 1),
            drawn,
            {node: claimed for node in range(1, 5)},
        )

    seen: Counter[tuple[int, ...]] = Counter()
    engine, strategy = Engine(model), ScriptedStrategy(script)
    for seed in range(draws):
        controls = Controls(max_new_tokens=3, temperature=1.5, seed=seed)
        run = engine.generate(strategy, prompt, controls)
        seen[tuple(run.token_ids[1:])] += 1
    return fits(seen, toy_distribution(model, prompt, temperature=1.5))


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [Drawn.INDEPENDENT, Drawn.WITHOUT_REPLACEMENT])
def test_frequencies_of_the_engines_output_fit_the_targets_distribution(
    drawn: Drawn,
) -> None:
    assert run_with_sampled_trees(drawn, honest=True, draws=1200)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [Drawn.INDEPENDENT, Drawn.WITHOUT_REPLACEMENT])
def test_frequencies_betray_a_drafter_that_lies_about_its_distribution(
    drawn: Drawn,
) -> None:
    assert not run_with_sampled_trees(drawn, honest=False, draws=1200)


@st.composite
def judged_trees(draw: st.DrawFn) -> tuple[TokenTree, list[torch.Tensor]]:
    """A tree of distinct siblings and a distribution after each of its nodes."""
    tokens, parents = [0], [-1]
    taken: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, 9))):
        parent = draw(st.integers(0, len(tokens) - 1))
        token = draw(st.integers(0, VOCAB - 1))
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    found = [draw(distributions()) for _ in tokens]
    return TokenTree(tokens, parents), found


def typical_paths(
    tree: TokenTree, after: Sequence[torch.Tensor], epsilon: float, delta: float
) -> list[tuple[int, float, list[int]]]:
    """Every path from the root whose tokens all pass: length, likelihood, nodes."""
    found = []
    for node in range(len(tree)):
        path = tree.ancestors()[node]
        likelihood, passes = 0.0, True
        for parent, child in itertools.pairwise(path):
            distribution = after[parent].tolist()
            entropy = -sum(p * math.log(p) for p in distribution if p > 0)
            chance = distribution[tree.tokens[child]]
            passes &= chance > min(epsilon, delta * math.exp(-entropy))
            likelihood += math.log(chance) if chance > 0 else -math.inf
        if passes:
            found.append((len(path) - 1, likelihood, path))
    return found


@pytest.mark.slow
@given(judged_trees(), st.floats(0.01, 0.9), st.floats(0.05, 1.0))
def test_typical_acceptance_keeps_the_longest_then_likeliest_typical_path(
    judged: tuple[TokenTree, list[torch.Tensor]], epsilon: float, delta: float
) -> None:
    tree, after = judged
    asked = []

    def distribution(node: int, tokens: Sequence[int]) -> torch.Tensor:
        assert list(tokens) == tree.path_tokens(node)
        asked.append(node)
        return after[node]

    def pick(probs: torch.Tensor, depth: int) -> int:
        assert depth == len(asked_path())
        return int(probs.argmax())

    def asked_path() -> list[int]:
        return max(typical_paths(tree, after, epsilon, delta), key=rank)[2][1:]

    def rank(path: tuple[int, float, list[int]]) -> tuple[int, float]:
        return path[0], round(path[1], 9)

    accepted = accept_typical(tree, Typical(epsilon, delta), distribution, pick)
    every = typical_paths(tree, after, epsilon, delta)
    best = max(map(rank, every))
    mine = [path for path in every if path[2] == accepted.path]
    assert mine, "a path that doesn't pass was kept"
    assert rank(mine[0])[0] == best[0]
    assert mine[0][1] == pytest.approx(best[1])
    assert accepted.token == int(after[accepted.path[-1]].argmax())
    assert len(asked) == len(set(asked)), "a distribution was computed twice"


def test_a_sure_target_lets_nothing_pass_but_its_own_choice() -> None:
    distribution = torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64)
    tree = TokenTree([0, 1, 0], [-1, 0, 0])
    accepted = accept_typical(
        tree, Typical(0.09, 0.3), lambda *_: distribution, lambda probs, _: 3
    )
    assert (accepted.path, accepted.token) == ([0, 2], 3)


def test_an_unsure_target_lets_less_likely_tokens_pass() -> None:
    distribution = torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    # exp(-entropy) is 1 / 4: a quarter is above 0.3 of it and not above all of it.
    assert Typical(0.9, 0.3).bar(distribution) == pytest.approx(0.075)
    tree = TokenTree([0, 2], [-1, 0])
    for alpha, length in ((0.3, 2), (1.0, 1)):
        accepted = accept_typical(
            tree, Typical(0.9, alpha), lambda *_: distribution, lambda probs, _: 1
        )
        assert len(accepted.path) == length
