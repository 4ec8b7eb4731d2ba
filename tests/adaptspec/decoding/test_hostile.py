"""Whatever is proposed, the output is plain decoding's; what is no tree is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Generation
from adaptspec.errors import InvalidTreeError
from adaptspec.strategy import Context
from adaptspec.testing.fakes import POSITIONS, VOCAB, ScriptedStrategy, random_ids
from adaptspec.testing.strategies import plain_strategy, target_and_draft
from adaptspec.token_tree import Drawn, TokenTree

PROMPT = tuple(random_ids(11, seed=6))
NEW_TOKENS = 14
GREEDY = Controls.greedy(NEW_TOKENS)
SAMPLED = Controls(NEW_TOKENS, temperature=0.9, top_p=0.9, seed=2)

Script = Callable[[Context], TokenTree]


@functools.cache
def plain(architecture: str, sampled: bool) -> list[int]:
    """Plain decoding's output."""
    return decode(None, architecture, SAMPLED if sampled else GREEDY).token_ids


def decode(
    script: Script | None, architecture: str = "llama", controls: Controls = GREEDY
) -> Generation:
    """Decode with what ``script`` proposes."""
    engine = Engine(target_and_draft(architecture)[0])
    strategy = plain_strategy() if script is None else ScriptedStrategy(script)
    return engine.generate(strategy, PROMPT, controls)


def right(tokens: Sequence[int], depth: int) -> Script:
    """Propose what plain decoding is known to emit next."""

    def script(context: Context) -> TokenTree:
        done = len(context.ids) - len(PROMPT)
        return TokenTree.chain(context.ids[-1], list(tokens[done : done + depth]))

    return script


@st.composite
def hostile_trees(draw: st.DrawFn) -> Callable[[int, list[int]], TokenTree]:
    """Any valid tree, with right tokens put among the wrong, and probes among both."""
    count = draw(st.integers(1, 14))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, count))]
    tokens = [draw(st.integers(0, VOCAB - 1)) for _ in range(count)]
    is_right = [draw(st.booleans()) for _ in range(count)]
    marked = [draw(st.integers(0, 5)) == 0 for _ in range(count)]

    def build(root: int, truth: list[int]) -> TokenTree:
        depths, kept, probes = [0], [(root, -1)], set()
        taken: set[tuple[int, int]] = set()
        for node in range(1, count):
            parent = min(parents[node], len(kept) - 1)
            depth = depths[parent]
            token = tokens[node]
            if is_right[node] and depth < len(truth):
                token = truth[depth]
            probe = marked[node] or parent in probes
            if not probe and (parent, token) in taken:
                continue
            if probe:
                probes.add(len(kept))
            else:
                taken.add((parent, token))
            kept.append((token, parent))
            depths.append(depth + 1)
        return TokenTree(
            [token for token, _ in kept],
            [parent for _, parent in kept],
            probes=frozenset(probes),
            unread=frozenset(node for node in probes if node % 2),
        )

    return build


@pytest.mark.slow
@settings(max_examples=12)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "bloom"])
@pytest.mark.parametrize("sampled", [False, True])
@given(st.lists(hostile_trees(), min_size=1, max_size=4))
def test_random_trees_change_nothing(
    architecture: str,
    sampled: bool,
    trees: list[Callable[[int, list[int]], TokenTree]],
) -> None:
    expected = plain(architecture, sampled)

    def script(context: Context) -> TokenTree:
        truth = expected[len(context.ids) - len(PROMPT) :]
        return trees[context.step % len(trees)](context.ids[-1], truth)

    run = decode(script, architecture, SAMPLED if sampled else GREEDY)
    assert run.token_ids == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral", "bloom"])
@pytest.mark.parametrize("sampled", [False, True])
def test_right_proposals_are_all_accepted(architecture: str, sampled: bool) -> None:
    expected = plain(architecture, sampled)
    controls = SAMPLED if sampled else GREEDY
    run = decode(right(expected, depth=4), architecture, controls)
    assert run.token_ids == expected
    assert run.stats.accepted == run.stats.proposed
    # The prefill gives one token, each step four and one more: 1 + 5 + 5 + 3.
    assert run.stats.target_forwards == 3
    assert [step.emitted for step in run.stats.steps] == [5, 5, 3]


def test_wrong_proposals_cost_nothing_but_the_step() -> None:
    expected = plain("llama", False)

    def script(context: Context) -> TokenTree:
        truth = [*expected[len(context.ids) - len(PROMPT) :], 0, 0]
        return TokenTree.chain(context.ids[-1], [(truth[0] + 1) % VOCAB, truth[1]])

    run = decode(script)
    assert run.token_ids == expected
    assert run.stats.accepted == 0
    assert run.stats.target_forwards == NEW_TOKENS - 1


@pytest.mark.parametrize("end", range(1, NEW_TOKENS))
def test_eos_inside_an_accepted_path_ends_the_output_there(end: int) -> None:
    expected = plain("llama", False)
    eos = expected[end]
    first = expected.index(eos)
    controls = Controls.greedy(NEW_TOKENS, (eos,))
    run = decode(right(expected, depth=8), controls=controls)
    assert run.token_ids == expected[: first + 1]
    assert run.finish == "eos"
    assert run.stats.new_tokens == first + 1


@pytest.mark.parametrize("limit", range(1, NEW_TOKENS))
def test_proposals_beyond_the_limit_emit_nothing_beyond_it(limit: int) -> None:
    expected = plain("llama", False)
    controls = Controls.greedy(limit)
    run = decode(right(expected, depth=NEW_TOKENS), controls=controls)
    assert (run.token_ids, run.finish) == (expected[:limit], "length")
    assert sum(step.emitted for step in run.stats.steps) == limit - 1


def test_proposals_beyond_the_models_positions_are_cut() -> None:
    model = target_and_draft("gpt2")[0]
    prompt = random_ids(POSITIONS - 4, seed=1)
    strategy = ScriptedStrategy(lambda c: TokenTree.chain(c.ids[-1], [5] * 30))
    run = Engine(model).generate(strategy, prompt, Controls.greedy(100))
    assert run.token_ids == (
        Engine(model).generate(plain_strategy(), prompt, Controls.greedy(100)).token_ids
    )
    assert len(run.token_ids) == 4


def test_more_nodes_than_the_limit_are_cut() -> None:
    expected = plain("llama", False)
    controls = Controls(NEW_TOKENS, max_nodes=3)
    run = decode(right(expected, depth=9), controls=controls)
    assert run.token_ids == expected
    assert max(step.proposed for step in run.stats.steps) == 3


def test_probes_are_evaluated_and_never_accepted() -> None:
    expected = plain("llama", False)
    outcomes: list[bool] = []

    def script(context: Context) -> TokenTree:
        truth = expected[len(context.ids) - len(PROMPT) :][:2]
        tokens = (context.ids[-1], *truth)
        probes = frozenset(range(1, len(tokens)))
        return TokenTree(tokens, range(-1, len(truth)), probes=probes)

    strategy = ScriptedStrategy(script)
    run = Engine(target_and_draft("llama")[0]).generate(strategy, PROMPT, GREEDY)
    assert run.token_ids == expected
    assert run.stats.proposed == run.stats.accepted == 0
    for outcome in strategy.outcomes[1:-1]:
        # A right probe's logits foretell what comes after it.
        done = len(outcome.path)
        assert done == 1
        assert outcome.tree is not None
        outcomes.append(len(outcome.tree) == 1 or 1 in outcome.rows)
    second = strategy.outcomes[1]
    assert int(second.logits[second.rows[1]].argmax()) == expected[2]
    assert all(outcomes)


def bad_trees(root: int) -> dict[str, TokenTree]:
    """What a buggy drafter may return, by what is wrong with it."""
    half = {1: torch.full((VOCAB,), 1 / VOCAB)}
    return {
        "one length": TokenTree((root, 1), (-1,)),
        "node 0": TokenTree(((root + 1) % VOCAB, 1), (-1, 0)),
        "with parent -1": TokenTree((root, 1), (0, 0)),
        "precede": TokenTree((root, 1, 2), (-1, 2, 0)),
        "got parent -1": TokenTree((root, 1), (-1, -1)),
        "got parent 1 of 1": TokenTree((root, 1), (-1, 1)),
        f"in 0..{VOCAB - 1}, got {VOCAB}": TokenTree((root, VOCAB), (-1, 0)),
        f"in 0..{VOCAB - 1}, got -1": TokenTree((root, -1), (-1, 0)),
        "distinct": TokenTree((root, 3, 3), (-1, 0, 0)),
        "below the probe": TokenTree((root, 3, 4), (-1, 0, 1), probes=frozenset({1})),
        "only probes may be unread": TokenTree(
            (root, 3), (-1, 0), unread=frozenset({1})
        ),
        "root excluded": TokenTree((root,), (-1,), probes=frozenset({0})),
        "nodes of the tree": TokenTree((root, 3), (-1, 0), probes=frozenset({5})),
        "need draft_probs, missing for [2]": TokenTree(
            (root, 3, 4), (-1, 0, 0), Drawn.WITHOUT_REPLACEMENT, half
        ),
    }


@pytest.mark.parametrize("wrong", list(bad_trees(0)))
def test_what_is_no_tree_is_refused_and_the_drafter_closed(wrong: str) -> None:
    strategy = ScriptedStrategy(lambda c: bad_trees(c.ids[-1])[wrong])
    engine = Engine(target_and_draft("llama")[0])
    with pytest.raises(InvalidTreeError) as raised:
        engine.generate(strategy, PROMPT, GREEDY)
    assert wrong in str(raised.value)
    assert (strategy.opened, strategy.closed) == (1, 1)


def test_the_drafter_is_closed_once_whether_the_run_ends_fails_or_is_given_up() -> None:
    engine = Engine(target_and_draft("llama")[0])
    strategy = plain_strategy()
    engine.generate(strategy, PROMPT, GREEDY)
    assert strategy.closed == 1

    def fail(tokens: list[int]) -> None:
        raise RuntimeError("the reader went away")

    with pytest.raises(RuntimeError, match="went away"):
        engine.generate(strategy, PROMPT, GREEDY, fail)
    assert strategy.closed == 2
    pieces = engine.stream(strategy, PROMPT, GREEDY)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert strategy.closed == 3
