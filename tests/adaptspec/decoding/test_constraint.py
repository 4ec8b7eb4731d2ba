"""What a language makes of a proposal, against lists of all its texts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.decoding.constraint import Constraint, Matcher, Shaped
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import SequenceStateError
from adaptspec.strategy import Context, Drafter, Strategy, Target
from adaptspec.testing.fakes import tiny_model
from adaptspec.testing.strategies import fits
from adaptspec.token_tree import Drawn, TokenTree

END, WIDTH, ROOT = 0, 6, 5

Texts = list[tuple[int, ...]]


class Listed:
    """The language of some texts, each ended by :data:`END`. Slow and plain."""

    def __init__(self, texts: Texts) -> None:
        self._texts = [(*text, END) for text in texts]
        self.at: list[int] = []

    def _next(self) -> set[int]:
        here = len(self.at)
        return {
            text[here]
            for text in self._texts
            if list(text[:here]) == self.at and len(text) > here
        }

    def accept(self, token: int) -> bool:
        legal = token in self._next()
        if legal:
            self.at.append(token)
        return legal

    def rollback(self, count: int) -> None:
        assert 0 < count <= len(self.at)
        del self.at[len(self.at) - count :]

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(WIDTH, dtype=torch.bool)
        mask[list(self._next())] = True
        return mask

    def forced(self) -> list[int]:
        walked = Listed([text[:-1] for text in self._texts])
        walked.at = list(self.at)
        while len(only := walked._next()) == 1 and END not in only:
            walked.accept(*only)
        return walked.at[len(self.at) :]

    @property
    def finished(self) -> bool:
        return self._next() <= {END}


def constraint(texts: Texts, prompt: int = 1) -> Constraint:
    matcher: Matcher = Listed(texts)
    return Constraint(matcher, prompt, (END,))


def legal(texts: Texts, path: Sequence[int]) -> bool:
    whole = [(*text, END) for text in texts]
    return any(text[: len(path)] == tuple(path) for text in whole)


tokens = st.integers(1, 3)
languages = st.lists(st.lists(tokens, max_size=6).map(tuple), min_size=1, max_size=5)


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any tree of a drafter, with probes."""
    drawn = draw(st.sampled_from(list(Drawn)))
    count = draw(st.integers(1, 10))
    kept, parents, probes = [ROOT], [-1], set()
    taken: set[tuple[int, int]] = set()
    for _ in range(1, count):
        parent = draw(st.integers(0, len(kept) - 1))
        token = draw(st.integers(0, 3))
        probe = parent in probes or draw(st.integers(0, 6)) == 0
        if not probe and (parent, token) in taken:
            continue
        taken |= set() if probe else {(parent, token)}
        probes |= {len(kept)} if probe else set()
        kept.append(token)
        parents.append(parent)
    probs = {
        node: torch.full((WIDTH,), 1 / WIDTH)
        for node in range(1, len(kept))
        if node not in probes and drawn is not Drawn.DETERMINISTIC
    }
    return TokenTree(kept, parents, drawn, probs, frozenset(probes))


def paths(tree: TokenTree) -> dict[tuple[int, ...], int]:
    """Candidates by their path's tokens."""
    return {
        tuple(tree.path_tokens(node)): node
        for node in range(1, len(tree))
        if node not in tree.probes
    }


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    texts=languages,
    tree=trees(),
    nodes=st.integers(0, 12),
    more=st.integers(0, 6),
    depth=st.integers(0, 6),
    chain=st.booleans(),
)
def test_a_shaped_tree_keeps_what_is_legal_and_drafts_what_is_forced(
    texts: Texts, tree: TokenTree, nodes: int, more: int, depth: int, chain: bool
) -> None:
    most = nodes + more
    shaped = constraint(texts).shape(tree, nodes, most, depth, chain)
    found = shaped.tree
    found.check(ROOT, WIDTH)
    assert len(found) <= most + 1
    assert max(found.depths) <= depth
    assert found.is_chain or not chain
    proposed = paths(tree)
    by_origin = dict(enumerate(shaped.origins))
    for path, node in paths(found).items():
        origin = by_origin[node]
        assert (path in proposed) == (origin >= 0) or tree.drawn is Drawn.INDEPENDENT
        if origin >= 0:
            assert tuple(tree.path_tokens(origin)) == path
            assert (node in found.draft_probs) == (origin in tree.draft_probs)
        if not legal(texts, path):  # it counts as drawn, and nothing is below it
            assert tree.drawn is not Drawn.DETERMINISTIC
            assert not found.children[node]
    forced_path(texts, shaped)
    room = len(tree) - 1 <= nodes
    if room and more == 6 and not chain:
        assert not lost(texts, tree, found, depth)


def forced_path(texts: Texts, shaped: Shaped) -> None:
    """The first nodes are a chain that is the only one there is."""
    for node in range(1, shaped.forced + 1):
        assert shaped.tree.parents[node] == node - 1
        before = shaped.tree.path_tokens(node)[:-1]
        others = [t for t in range(WIDTH) if legal(texts, [*before, t])]
        assert others == [shaped.tree.tokens[node]]


def lost(
    texts: Texts, tree: TokenTree, found: TokenTree, depth: int
) -> set[tuple[int, ...]]:
    """Legal candidates that were left out though there was room."""
    return {
        path
        for path in paths(tree)
        if len(path) <= depth and legal(texts, path) and path not in paths(found)
    }


def test_forced_tokens_come_before_in_between_and_after() -> None:
    texts: Texts = [(1, 2, 3, 1, 2, 2), (1, 2, 1, 1, 3)]
    alone = constraint(texts).shape(TokenTree.root_only(ROOT), 9, 9, 9)
    assert (list(alone.tree.tokens), alone.forced) == ([ROOT, 1, 2], 2)
    drafted = TokenTree.chain(ROOT, [1, 2, 3])
    along = constraint(texts).shape(drafted, 9, 9, 9)
    assert list(along.tree.tokens) == [ROOT, 1, 2, 3, 1, 2, 2, END]
    assert along.tree.is_chain
    assert (along.origins, along.forced) == ([0, 1, 2, 3, -1, -1, -1, -1], 2)
    wrong = constraint(texts).shape(TokenTree.chain(ROOT, [1, 1, 3]), 9, 9, 9)
    assert (list(wrong.tree.tokens), wrong.forced) == ([ROOT, 1, 2], 2)
    # The guard's limit is the drafter's, not that of what costs it nothing.
    limited = constraint(texts).shape(drafted, 1, 9, 9)
    assert list(limited.tree.tokens) == [ROOT, 1, 2]


def test_masks_follow_any_order_of_questions() -> None:
    texts: Texts = [(1, 2, 3), (1, 3), (2,)]
    asked = constraint(texts, prompt=2)
    drawn = random.Random(0)
    committed: list[int] = []
    for token in (1, 2, 3, END):
        for _ in range(20):
            tail = [drawn.randint(1, 3) for _ in range(drawn.randint(0, 3))]
            ids = torch.tensor([[7, 7, *committed, *tail]])
            scores = asked(ids, torch.zeros(1, WIDTH + 3))
            path = [*committed, *tail]
            wanted = [t for t in range(WIDTH) if legal(texts, [*path, t])]
            if not legal(texts, path):
                assert bool((scores == 0).all())
            else:
                assert scores[0].isfinite().nonzero()[:, 0].tolist() == wanted
        asked.commit([token])
        committed.append(token)
    past = asked(torch.tensor([[7, 7]]), torch.zeros(1, WIDTH))
    assert bool((past == 0).all())


def test_an_illegal_token_is_no_part_of_an_output() -> None:
    asked = constraint([(1, 2)])
    with pytest.raises(SequenceStateError, match="token 3 at position 2 isn't one"):
        asked.commit([1, 3])


class Rash(Strategy):
    """Draws from one distribution, most of which is illegal."""

    name = "rash"
    summary = "sampled trees"

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self._drawn = drawn

    def start(self, target: Target) -> Drafter:
        """Two siblings, and two below each."""
        drawn = self._drawn
        probs = torch.tensor([0.0, 0.2, 0.1, 0.05, 0.4, 0.25])

        class Drawing(Drafter):
            def propose(self, context: Context) -> TokenTree:
                tokens, parents, draft_probs = [context.ids[-1]], [-1], {}
                for parent in (0, 1, 2):
                    pair = [target.sampling.draw(probs)[0] for _ in range(2)]
                    if drawn is Drawn.WITHOUT_REPLACEMENT:
                        pair = target.sampling.draw(probs, 2)
                    for token in pair:
                        draft_probs[len(tokens)] = probs
                        tokens.append(token)
                        parents.append(parent)
                return TokenTree(tokens, parents, drawn, draft_probs)

        return Drawing()


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [Drawn.INDEPENDENT, Drawn.WITHOUT_REPLACEMENT])
def test_sampled_trees_keep_the_masked_distribution(
    drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drawn illegally must count as drawn."""
    texts: Texts = [(a, b, c) for a in (1, 2) for b in (1, 3) for c in (2, 3)]
    prompt = [5, 4, 3]
    model = tiny_model("llama", vocab_size=WIDTH, max_position_embeddings=32)
    monkeypatch.setattr(
        "adaptspec.decoding.engine.open_constraint",
        lambda model, controls, prompt: constraint(texts, prompt),
    )

    def after(path: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = model.source(torch.tensor([[*prompt, *path]])).logits[0, -1]
        wanted = [t for t in range(WIDTH) if legal(texts, [*path, t])]
        mask = torch.full((WIDTH,), -torch.inf)
        mask[wanted] = 0
        probs: torch.Tensor = (logits / 2 + mask).softmax(-1)
        return probs

    chances: dict[tuple[int, ...], float] = {
        (a, b, c): float(after(())[a] * after((a,))[b] * after((a, b))[c])
        for a, b, c in texts
    }
    engine, seen = Engine(model, guard=False), Counter[tuple[int, ...]]()
    for seed in range(500):
        controls = Controls(3, temperature=2.0, seed=seed)
        done = engine.generate(Rash(drawn), prompt, controls)
        seen[tuple(done.token_ids)] += 1
    assert set(seen) <= set(texts)
    assert fits(seen, chances)
