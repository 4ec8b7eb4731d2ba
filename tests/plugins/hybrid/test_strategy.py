"""The hybrid against brute force, simulated drafters and a clock of our own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace
from typing import Any, cast
from zlib import crc32

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import InvalidTreeError
from adaptspec.knowledge import KnowledgeWarning
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import (
    Context,
    Drafter,
    Observes,
    Outcome,
    Requirements,
    Strategy,
    Target,
)
from adaptspec.testing import StrategyContract
from adaptspec.token_tree import Drawn, TokenTree
from adaptspec_plugins import register_strategies
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.hybrid.candidates import MOST_TOGETHER, Candidates
from adaptspec_plugins.hybrid.chances import BUCKETS, Calibration, shipped
from adaptspec_plugins.hybrid.plan import MERIT, best_first, best_tree, likeliest_path
from adaptspec_plugins.hybrid.strategy import Hybrid, HybridParams

Paths = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=0, max_size=4
)
ROOT = 7


@pytest.fixture(autouse=True)
def only_verification_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth more for each row: runs on models repeat exactly."""
    clock, verify = Clock(), LanguageModel.forward_tree

    def timed(model: LanguageModel, tree: TokenTree, *args: Any, **more: Any) -> Any:
        clock.now += 1 + len(tree) / 100
        return verify(model, tree, *args, **more)

    monkeypatch.setattr(LanguageModel, "forward_tree", timed)
    for module in ("decoding.engine", "model.forward_times"):
        monkeypatch.setattr(f"adaptspec.{module}.perf_counter", clock)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class TestHybrid(StrategyContract):
    strategy = Hybrid
    params = ({}, {"use_draft": False, "draft_length": 6})


def prefixes(paths: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}


def spelled(candidates: Candidates, node: int) -> tuple[int, ...]:
    tokens: list[int] = []
    while node:
        tokens.insert(0, candidates.tokens[node])
        node = candidates.parents[node]
    return tuple(tokens)


def merged(proposals: Sequence[Sequence[Sequence[int]]]) -> Candidates:
    candidates = Candidates(ROOT, 100)
    for member, paths in enumerate(proposals):
        candidates.add(TokenTree.from_paths(ROOT, paths), member)
    return candidates


@given(st.lists(Paths, max_size=3), st.integers(0, 4), st.permutations(range(3)))
def test_the_trie_holds_each_path_once_and_who_proposed_it(
    proposals: list[list[list[int]]], depth: int, order: list[int]
) -> None:
    candidates = Candidates(ROOT, depth)
    for member in order:
        if member < len(proposals):
            tree = TokenTree.from_paths(ROOT, proposals[member])
            candidates.add(tree, member)
    found = [spelled(candidates, node) for node in range(1, len(candidates))]
    wanted = {p for paths in proposals for p in prefixes(paths) if len(p) <= depth}
    assert sorted(found) == sorted(wanted)
    for node, path in enumerate(found, 1):
        owners = [m for m, paths in enumerate(proposals) if path in prefixes(paths)]
        assert [member for member, _ in candidates.marks[node]] == owners


def test_probes_and_what_hangs_below_the_deepest_level_are_left_out() -> None:
    tree = TokenTree([ROOT, 1, 2, 3, 4], [-1, 0, 0, 2, 1], probes=frozenset({2, 3}))
    candidates = Candidates(ROOT, 1)
    candidates.add(tree, 0)
    assert candidates.tokens == [ROOT, 1]


def test_a_sampled_proposal_is_refused_by_the_members_name() -> None:
    tree = TokenTree([ROOT, 1], [-1, 0], Drawn.INDEPENDENT)
    with pytest.raises(InvalidTreeError, match="'gambler' proposes independent"):
        Candidates(ROOT, 5).add(tree, 0, "gambler")


@dataclass
class Chances:
    """A chance for each path, drawn once; three siblings never reach certainty."""

    candidates: Candidates
    seed: int

    def of(self, node: int) -> float:
        return Random(f"{self.seed}{spelled(self.candidates, node)}").random() * 0.32

    def given_marks(self) -> Callable[[Any], float]:
        by_marks = {
            id(self.candidates.marks[n]): n for n in range(len(self.candidates))
        }
        return lambda marks: self.of(by_marks[id(marks)])

    def of_path(self, node: int) -> float:
        product = 1.0
        while node:
            product *= self.of(node)
            node = self.candidates.parents[node]
        return product

    def counting(self, node: int) -> float:
        """What it counts for in the choice."""
        return MERIT(self.of_path(node), len(spelled(self.candidates, node)))


def closed_subsets(candidates: Candidates) -> list[tuple[int, ...]]:
    nodes = range(1, len(candidates))
    return [
        chosen
        for size in range(len(candidates))
        for chosen in itertools.combinations(nodes, size)
        if all(candidates.parents[n] in (0, *chosen) for n in chosen)
    ]


Small = Paths.filter(lambda paths: len(prefixes(paths)) <= 9)
Curve = st.lists(st.floats(0.0, 0.4), min_size=10, max_size=10)


@pytest.mark.slow
@given(Small, st.integers(0, 99))
def test_best_first_has_the_largest_sum_of_all_closed_sets_of_its_size(
    paths: list[list[int]], seed: int
) -> None:
    candidates = merged([paths])
    chances = Chances(candidates, seed)
    found = list(best_first(candidates, chances.given_marks(), 100))
    assert sorted(n for n, _ in found) == list(range(1, len(candidates)))
    best: dict[int, float] = {}
    for chosen in closed_subsets(candidates):
        total = sum(chances.counting(node) for node in chosen)
        best[len(chosen)] = max(best.get(len(chosen), 0.0), total)
    for size, total in best.items():
        chosen = tuple(sorted(node for node, _ in found[:size]))
        assert chosen in closed_subsets(candidates)
        assert sum(map(chances.counting, chosen)) == pytest.approx(total)
    for node, chance in found:
        assert chance == pytest.approx(chances.of_path(node))


def costs(rises: Sequence[float]) -> Callable[[int], float]:
    return lambda rows: 1.0 + sum(rises[: rows - 1])


@given(Small, st.integers(0, 99), Curve, st.floats(0, 1), st.floats(0.5, 4))
def test_no_closed_set_is_worth_more_at_the_pace_than_the_tree_chosen(
    paths: list[list[int]], seed: int, rises: list[float], spent: float, pace: float
) -> None:
    candidates = merged([paths])
    chances, seconds = Chances(candidates, seed), costs(rises)
    nodes = list(best_first(candidates, chances.given_marks(), 100))
    plan = best_tree(
        iter(nodes), candidates.depths, seconds, spent, pace, most=len(nodes)
    )

    def worth(chosen: Sequence[int]) -> float:
        gained = sum(map(chances.counting, chosen))
        return 1 + gained - pace * (spent + seconds(1 + len(chosen)))

    best = max(map(worth, closed_subsets(candidates)))
    assert worth([node for node, _ in plan.nodes]) == pytest.approx(best)
    assert plan.tokens == pytest.approx(1 + sum(c for _, c in plan.nodes))
    assert plan.seconds == pytest.approx(spent + seconds(1 + len(plan.nodes)))


def test_a_node_that_does_not_pay_alone_is_taken_if_the_next_one_is_free() -> None:
    seconds = {1: 1.0, 2: 1.6, 3: 1.6, 4: 9.0}.__getitem__
    nodes = [(1, 0.5), (2, 0.5), (3, 0.5)]
    plan = best_tree(iter(nodes), [0, 1, 1, 1], seconds, spent=0.0, pace=1.0, most=3)
    assert plan.nodes == nodes[:2]
    assert plan.tokens == 2.0


@given(Small, st.integers(0, 99), st.integers(0, 4))
def test_a_chain_follows_the_likeliest_child_of_each_node(
    paths: list[list[int]], seed: int, most: int
) -> None:
    candidates = merged([paths])
    chances = Chances(candidates, seed)
    found = list(likeliest_path(candidates, chances.given_marks(), most))
    end = 0
    for node, chance in found:
        siblings = candidates.children[end].values()
        assert chances.of(node) == max(map(chances.of, siblings))
        assert node in siblings
        assert chance == pytest.approx(chances.of_path(node))
        end = node
    assert len(found) == most or not candidates.children[end]


@given(Small, st.integers(0, 99), st.integers(0, 9))
def test_the_tree_spells_the_chosen_nodes_with_the_likeliest_child_first(
    paths: list[list[int]], seed: int, size: int
) -> None:
    candidates = merged([paths])
    chances = Chances(candidates, seed)
    nodes = list(best_first(candidates, chances.given_marks(), size))
    tree = candidates.tree(nodes)
    tree.check(ROOT, 64)
    chance_of = {spelled(candidates, node): chance for node, chance in nodes}
    assert {tuple(tree.path_tokens(n)) for n in range(1, len(tree))} == set(chance_of)
    for node, children in enumerate(tree.children):
        ranked = [chance_of[tuple(tree.path_tokens(child))] for child in children]
        assert ranked == sorted(ranked, reverse=True)
        if children:  # so that the likeliest path lies at once behind the root
            assert children[0] == node + 1


@given(st.lists(st.floats(0.01, 0.995), min_size=2, max_size=5))
def test_siblings_together_stay_below_certainty_and_the_likeliest_keeps_its_chance(
    chances: list[float],
) -> None:
    candidates = merged([[[token] for token in range(len(chances))]])
    drawn = iter(chances)
    shares = dict(candidates.shares(0, lambda marks: next(drawn)))
    found = [shares[node] for node in range(1, len(candidates))]
    assert sum(found) <= MOST_TOGETHER + 1e-9
    assert max(found) == pytest.approx(min(max(chances), MOST_TOGETHER))
    if sum(chances) <= MOST_TOGETHER:
        assert found == chances


# Simulated decoding: the text is known, drafters are right as often as they are told.


@dataclass
class World:
    """A text, a clock, and drafters that know the text."""

    text: Sequence[int]
    clock: Clock = field(default_factory=Clock)
    asked: dict[str, list[int]] = field(default_factory=dict)
    rise: float = 0.02  # seconds of a further row; the first takes 1
    vocab: int = 1000

    def seconds(self, rows: int) -> float:
        return 1.0 + self.rise * (rows - 1)

    def member(
        self,
        name: str,
        chance: float | Callable[[int], float],
        length: int = 4,
        evidence: Callable[[int, int], int] | None = lambda at, depth: depth,
        takes: float = 0.0,
        reads: float = 0.0,
        needs_draft: bool = False,
        source: str = "",
    ) -> type[Strategy]:
        """A strategy that drafts ``length`` tokens, each right with ``chance``.

        Two of one ``source`` are right and wrong at the same positions.
        """
        world = self

        class Scripted(Drafter):
            started = False

            def propose(self, context: Context) -> TokenTree:
                at = len(context.ids)
                world.asked.setdefault(name, []).append(at)
                world.clock.now += takes + (0 if self.started else reads * at)
                self.started = True
                tokens = []
                for position in range(at, at + length):
                    likely = chance(position) if callable(chance) else chance
                    right = Random(f"{source or name}{position}").random() < likely
                    known = position < len(world.text)
                    true = world.text[position] if known else 0
                    own = 0 if right else 1 + crc32((source or name).encode()) % 50
                    tokens.append((true + own) % world.vocab)
                tree = TokenTree.chain(context.ids[-1], tokens)
                if evidence is None:
                    return tree
                seen = [evidence(at, depth) for depth in range(length + 1)]
                return replace(tree, evidence=seen)

        def start(self: Strategy, target: Target) -> Drafter:
            return Scripted()

        return type(
            "Member",
            (Strategy,),
            {
                "name": name,
                "summary": "",
                "joins": {},
                "requires": Requirements("same vocabulary" if needs_draft else None),
                "start": start,
            },
        )

    def decode(
        self,
        hybrid: Hybrid,
        begin: int = 10,
        passed_over: Callable[[int], bool] = lambda step: False,
    ) -> list[Step]:
        """Run the text through; the steps in order."""
        ready = SimpleNamespace(level="tree", reason="")
        model: Any = SimpleNamespace(
            capability=ready,
            heads={},
            latency=self.seconds,
            vocabulary_mismatch=lambda other: None,
        )
        nothing: Any = None
        target = Target(
            model, model, None, self.text[:begin], nothing, True, self.clock
        )
        drafter = cast(Any, hybrid.start(target))
        logits = torch.zeros(1, 1)
        drafter.observe(Outcome(None, (), self.text[begin : begin + 1], {}, logits))
        at = begin + 1
        steps: list[Step] = []
        while at < len(self.text):
            context = Context(
                list(self.text[:at]), len(self.text) - at, 128, len(steps)
            )
            tree = TokenTree.root_only(self.text[at - 1])
            if not passed_over(len(steps)):
                tree = drafter.propose(context)
            expected = drafter._plan.tokens if drafter._plan else 1.0
            self.clock.now += self.seconds(len(tree))
            path = [0]
            while True:
                wanted = self.text[at + len(path) - 1]
                hits = [c for c in tree.children[path[-1]] if tree.tokens[c] == wanted]
                if not hits:
                    break
                path.append(hits[0])
            emitted = self.text[at : at + len(path)]
            drafter.observe(Outcome(tree, path, emitted, {}, logits))
            steps.append(Step(at, tree, expected, len(emitted)))
            at += len(emitted)
        drafter.close()
        return steps


@dataclass(frozen=True)
class Step:
    at: int
    tree: TokenTree
    expected: float
    emitted: int


def world(length: int, **settings: Any) -> World:
    random = Random(length)
    return World([random.randrange(1000) for _ in range(length)], **settings)


def hybrid_of(*members: type[Strategy], **params: Any) -> Hybrid:
    hybrid = Hybrid(HybridParams(**params))
    hybrid.meet({cls.name: cls for cls in members})
    return hybrid


def calibration(hybrid: Hybrid) -> Calibration:
    return hybrid._members.calibration


@pytest.mark.slow
def test_chances_become_those_of_each_drafter_and_evidence() -> None:
    simulated = world(2000)
    hybrid = hybrid_of(
        simulated.member("fair", 0.4),
        simulated.member(
            "moody",
            lambda at: 0.9 if at % 200 < 100 else 0.1,
            evidence=lambda at, depth: 500 + (at % 200 < 100),
            length=1,
        ),
    )
    simulated.decode(hybrid)
    counts = calibration(hybrid).counts
    assert counts["fair"].chance(1) == pytest.approx(0.4, abs=0.06)
    assert counts["moody"].chance(501) == pytest.approx(0.9, abs=0.06)
    assert counts["moody"].chance(500) == pytest.approx(0.1, abs=0.06)
    # A bucket that was never seen goes by its member's mean.
    assert 0.2 < counts["moody"].chance(3) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    "sources", [("a",), ("a", "a", "b"), ("a", "a", "a")], ids="".join
)
def test_as_many_tokens_come_as_were_expected_where_drafters_draw_on_one_text(
    sources: tuple[str, ...],
) -> None:
    simulated = world(2500)
    hybrid = hybrid_of(
        *(
            simulated.member(f"member{i}", 0.6, source=source)
            for i, source in enumerate(sources)
        )
    )
    steps = simulated.decode(hybrid)[100:]
    expected = sum(step.expected for step in steps)
    assert sum(step.emitted for step in steps) == pytest.approx(expected, rel=0.03)


def test_expectations_follow_a_text_that_changes() -> None:
    simulated = world(2000)
    member = simulated.member("fickle", lambda at: 0.9 if at < 1000 else 0.2)
    steps = [s for s in simulated.decode(hybrid_of(member)) if s.at > 1200]
    expected = sum(step.expected for step in steps)
    assert sum(step.emitted for step in steps) == pytest.approx(expected, rel=0.05)


def test_proposals_that_were_not_verified_are_counted_too() -> None:
    simulated = world(400, rise=5.0)  # no tree pays
    hybrid = hybrid_of(simulated.member("good", 0.7, length=2))
    steps = simulated.decode(hybrid)
    assert all(len(step.tree) == 1 for step in steps)
    counts = calibration(hybrid).counts["good"]
    assert counts.chance(1) == pytest.approx(0.7, abs=0.1)
    assert counts.seen[1] > 200
    # Whether the second token was right isn't shown: one token came at a time.
    assert counts.seen[2] == 0


def test_nodes_behind_the_end_of_the_output_are_not_counted() -> None:
    simulated = world(13)
    hybrid = hybrid_of(simulated.member("good", 1.0))
    [step] = simulated.decode(hybrid)
    assert step.emitted == 2
    assert calibration(hybrid).counts["good"].seen[1:5] == [1, 0, 0, 0]


def test_a_step_without_a_proposal_changes_no_counts() -> None:
    simulated = world(40)
    hybrid = hybrid_of(simulated.member("good", 1.0))
    simulated.decode(hybrid, passed_over=lambda step: step % 2 == 1)
    # Each step has four right tokens; twice learnt from, the second would look wrong.
    counts = calibration(hybrid).counts["good"]
    assert counts.accepted == counts.seen
    assert sum(counts.seen) > 8


def test_steps_that_were_passed_over_are_no_measure_of_the_pace() -> None:
    """They emit one token each, whatever drafting would have brought."""
    paces = []
    passes: tuple[Callable[[int], bool], ...] = (
        lambda step: step % 4 > 0,
        lambda step: False,
    )
    for passed_over in passes:
        simulated = world(400)
        hybrid = hybrid_of(simulated.member("good", 1.0))
        simulated.decode(hybrid, passed_over=passed_over)
        paces.append(hybrid._members.pace.tokens)
    assert paces[1] > 3
    assert paces[0] == pytest.approx(paces[1], rel=0.1)


def test_a_drafter_that_is_never_right_leaves_the_tree_and_a_good_one_stays() -> None:
    simulated = world(1500)
    hybrid = hybrid_of(
        simulated.member("liar", 0.0), simulated.member("good", 0.8), draft_length=24
    )
    late = simulated.decode(hybrid)[150:]
    # Each proposes a chain: nothing forks where only one of them is believed.
    assert all(step.tree.is_chain and len(step.tree) > 1 for step in late)
    assert sum(step.emitted for step in late) > 2 * len(late)


def test_drafters_without_evidence_are_told_apart_by_depth_and_place() -> None:
    simulated = world(2000)
    hybrid = hybrid_of(simulated.member("plain", 0.7, evidence=None, length=2))
    steps = simulated.decode(hybrid)
    expected = sum(step.expected for step in steps[100:])
    emitted = sum(step.emitted for step in steps[100:])
    assert emitted == pytest.approx(expected, rel=0.03)
    assert sum(n > 0 for n in calibration(hybrid).counts["plain"].seen) == 2


def sure_then_unsure(simulated: World) -> type[Strategy]:
    """A free drafter: right in the first half of each 400 tokens, and knows it."""
    return simulated.member(
        "free",
        lambda at: 0.97 if at % 400 < 200 else 0.02,
        length=8,
        evidence=lambda at, depth: 16 * (at % 400 < 200) + depth,
    )


def test_the_draft_model_is_asked_only_where_the_free_drafters_are_unsure() -> None:
    simulated = world(2400)
    model = simulated.member("model", 0.85, takes=0.6, needs_draft=True)
    steps = simulated.decode(hybrid_of(sure_then_unsure(simulated), model))
    asked = set(simulated.asked["model"])
    late = [step.at for step in steps if step.at > 800]
    sure = [at in asked for at in late if at % 400 < 190]
    # The pace must fall first: the steps before made five tokens each.
    unsure = [at in asked for at in late if at % 400 > 300]
    assert sum(sure) <= 0.05 * len(sure)
    assert sum(unsure) >= 0.95 * len(unsure)


@pytest.mark.slow
def test_a_draft_model_that_pays_makes_the_hybrid_faster_than_either_alone() -> None:
    def total(free: bool, use_draft: bool) -> float:
        simulated = world(2000)
        members = [simulated.member("model", 0.85, takes=0.6, needs_draft=True)]
        if free:
            members.append(sure_then_unsure(simulated))
        simulated.decode(hybrid_of(*members, use_draft=use_draft))
        return simulated.clock.now

    assert total(True, True) < 0.9 * min(total(True, False), total(False, True))


@pytest.mark.slow
@pytest.mark.parametrize("needs_draft", [True, False])
def test_a_slow_drafter_that_is_seldom_right_costs_almost_nothing(
    needs_draft: bool,
) -> None:
    simulated = world(2000)
    slow = simulated.member("slow", 0.05, takes=0.5, needs_draft=needs_draft)
    simulated.decode(hybrid_of(slow))
    assert simulated.clock.now < 1.02 * 2000
    assert len(simulated.asked["slow"]) >= 5  # tried again: texts change


@pytest.mark.slow
def test_trying_a_model_that_never_pays_costs_under_a_hundredth() -> None:
    simulated = world(6000)
    free = sure_then_unsure(simulated)
    simulated.decode(hybrid_of(free))
    alone = simulated.clock.now
    simulated.clock.now = 0.0
    model = simulated.member("model", 0.5, takes=2.0, needs_draft=True)
    simulated.decode(hybrid_of(free, model))
    assert simulated.asked["model"]
    assert simulated.clock.now < 1.01 * alone


@pytest.mark.slow
@pytest.mark.parametrize(("length", "again"), [(14, False), (400, True)])
def test_a_model_known_not_to_pay_is_tried_again_in_long_answers_only(
    length: int, again: bool
) -> None:
    simulated = world(length)
    hybrid = hybrid_of(simulated.member("model", 0.05, takes=0.4, needs_draft=True))
    for _ in range(5):
        simulated.decode(hybrid)
    first = len(simulated.asked["model"])
    assert first
    for _ in range(5):
        simulated.decode(hybrid)
    assert (len(simulated.asked["model"]) > first) is again


def test_the_draft_model_reads_no_long_prompt_for_a_few_tokens() -> None:
    long = world(1000)
    settings: Mapping[str, Any] = {"takes": 0.5, "reads": 0.1, "needs_draft": True}
    hybrid = hybrid_of(long.member("model", 0.9, **settings))
    long.decode(hybrid)  # what a call brings and takes is known from here on
    before = len(long.asked["model"])
    long.decode(hybrid, begin=400)
    assert len(long.asked["model"]) > before + 100
    before = len(long.asked["model"])
    long.decode(hybrid, begin=980)
    assert len(long.asked["model"]) == before


def test_forwards_slower_than_the_curve_correct_it() -> None:
    simulated = world(400)
    hybrid = hybrid_of(simulated.member("model", 0.7, takes=0.5, needs_draft=True))
    simulated.decode(hybrid)
    assert hybrid._forward is not None
    told = hybrid._forward[1](5)
    simulated.seconds = lambda rows: 3.0 + 0.06 * (rows - 1)  # type: ignore[method-assign]
    simulated.decode(hybrid)
    assert hybrid._forward[1](5) == pytest.approx(3 * told, rel=0.3)


# Knowledge.


def learnt(seed: int, right: int, wrong: int) -> Calibration:
    found = Calibration(["one"])
    outcomes = [True] * right + [False] * wrong
    Random(seed).shuffle(outcomes)
    for outcome in outcomes:
        found.learn([(0, 9)], found.fresh(), outcome)
    return found


def test_counts_of_two_processes_add_up_once() -> None:
    first, second = learnt(1, 20, 5), learnt(2, 5, 20)
    stored = second.sync(first.sync(None))
    accepted, seen = stored["calibration/one"][9].tolist()
    assert (accepted, seen) == (pytest.approx(25, rel=0.05), pytest.approx(50, rel=0.1))
    for _ in range(5):  # nothing new: nothing grows
        stored = first.sync(stored)
        stored = second.sync(stored)
    assert stored["calibration/one"][9].tolist() == pytest.approx([accepted, seen])
    assert first.counts["one"].chance(9) == pytest.approx(0.5, abs=0.05)


def test_counts_stay_bounded_however_often_they_are_merged() -> None:
    stored: Mapping[str, torch.Tensor] | None = None
    for seed in range(30):
        stored = learnt(seed, 60, 40).sync(stored)
    assert stored is not None
    accepted, seen = stored["calibration/one"][9].tolist()
    assert seen <= 501
    assert accepted / seen == pytest.approx(0.6, abs=0.1)


def test_a_fresh_process_goes_on_with_what_was_stored() -> None:
    fresh = Calibration(["one"])
    fresh.sync(learnt(3, 90, 10).sync(None))
    assert fresh.counts["one"].chance(9) == pytest.approx(0.9, abs=0.05)
    assert fresh.counts["one"].chance(8) == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3, 2),
        torch.zeros(1024, 2, dtype=torch.int64),
        torch.full((1024, 2), float("nan")),
        torch.full((1024, 2), -1.0),
        torch.tensor([[2.0, 1.0]]).repeat(1024, 1),
    ],
    ids=["shape", "type", "nan", "negative", "more accepted than seen"],
)
def test_malformed_counts_are_refused_by_name_and_replaced(bad: torch.Tensor) -> None:
    known = learnt(4, 30, 10)
    with pytest.warns(KnowledgeWarning, match="calibration/one is not used"):
        held = known.sync({"calibration/one": bad})
    assert held["calibration/one"].shape == (1024, 2)
    assert known.counts["one"].chance(9) == pytest.approx(0.75, abs=0.06)


def test_stored_counts_of_strategies_that_no_longer_join_are_dropped() -> None:
    simulated = world(20)
    hybrid = hybrid_of(simulated.member("here", 0.5))
    gone = {"calibration/gone": torch.zeros(1024, 2), "gone@1/x": torch.ones(1)}
    assert set(hybrid.sync(gone)) == {"calibration/here"}


class Keeper(Autoregressive):
    """Adds up what it is given."""

    name = "keeper"
    joins = {}  # noqa: RUF012
    knowledge = 3
    given: Any = None

    def sync(self, stored: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        type(self).given = stored
        return {"sum": torch.ones(1) + (stored["sum"] if stored else 0)}


def test_members_keep_their_own_knowledge_of_their_own_version() -> None:
    hybrid = hybrid_of(Keeper)
    held = hybrid.sync(None)
    assert Keeper.given is None
    assert hybrid.sync(held)["keeper@3/sum"].item() == 2
    hybrid.sync({"keeper@2/sum": torch.ones(1)})
    assert Keeper.given is None


# On models.


class Curious(Autoregressive):
    """Wants hidden states, and looks at what it gets."""

    name = "curious"
    joins = {}  # noqa: RUF012
    wants = Observes()
    got: Any = None

    def observes(self, model: LanguageModel) -> Observes:
        return self.wants

    def start(self, target: Target) -> Drafter:
        cls = type(self)
        cls.got = []

        class Looking(Drafter):
            def propose(self, context: Context) -> TokenTree:
                return TokenTree.root_only(context.ids[-1])

            def observe(self, outcome: Outcome) -> None:
                cls.got.append({k: len(v) for k, v in outcome.hidden.items()})

        return Looking()


def test_each_member_is_given_the_hidden_states_it_asked_for(
    target: LanguageModel, prompt: list[int]
) -> None:
    wants = {
        "all": Observes(hidden_layers=(1, -1), prefill_hidden="all"),
        "last": Observes(hidden_layers=(-1,), prefill_hidden="last"),
        "steps": Observes(hidden_layers=(0,), prefill_logits=4),
        "none": Observes(),
    }
    members: list[Any] = [
        type(f"C{name}", (Curious,), {"name": name, "wants": observes})
        for name, observes in wants.items()
    ]
    hybrid = hybrid_of(*members)
    found = hybrid.observes(target)
    assert (set(found.hidden_layers), found.prefill_hidden) == ({0, 1, -1}, "all")
    assert found.prefill_logits == 4
    Engine(target).generate(hybrid, prompt, Controls.greedy(3))
    got = {cls.name: cls.got for cls in members}
    full = len(prompt)
    assert [got[name][0] for name in wants] == [{1: full, -1: full}, {-1: 1}, {}, {}]
    assert [got[name][1] for name in wants] == [{1: 1, -1: 1}, {-1: 1}, {0: 1}, {}]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_output_equals_plain_sampling_while_drafts_are_accepted(
    target: LanguageModel, prompt: list[int], seed: int
) -> None:
    controls = Controls(max_new_tokens=40, temperature=0.9, top_p=0.9, seed=seed)
    plain = Engine(target).generate(Autoregressive(), prompt, controls).token_ids
    simulated = World([*prompt, *plain], vocab=target.vocab_size)
    hybrid = hybrid_of(
        simulated.member("often", 0.8),
        simulated.member("seldom", 0.3, source="other"),
    )
    run = Engine(target).generate(hybrid, prompt, controls)
    assert run.token_ids == plain
    assert sum(step.accepted for step in run.stats.steps) > 10


def test_with_nothing_to_join_it_decodes_plainly(
    target: LanguageModel, prompt: list[int]
) -> None:
    controls = Controls.greedy(8)
    run = Engine(target).generate(hybrid_of(), prompt, controls)
    plain = Engine(target).generate(Autoregressive(), prompt, controls)
    assert run.token_ids == plain.token_ids
    assert all(step.proposed == 0 for step in run.stats.steps)


def test_bundled_members_join_if_no_strategies_were_registered() -> None:
    held = Hybrid().sync(None)
    assert "calibration/prompt_lookup" in held


def test_prior_counts_are_shipped_for_each_bundled_member() -> None:
    counts = shipped()
    joining = {cls.name for cls in register_strategies() if cls.joins is not None}
    assert set(counts) <= joining
    for evidence in counts.values():
        for bucket, (accepted, seen) in evidence.items():
            assert 0 <= bucket < BUCKETS
            assert 0 <= accepted <= seen <= 24


def test_a_calibration_begins_with_the_prior_and_soon_follows_what_it_sees() -> None:
    found = Calibration(["one"], (), {"one": {3: (18.0, 20.0)}})
    marks, shifts = [(0, 3)], found.fresh()
    assert found.chance(marks, shifts) > 0.7
    for _ in range(200):
        found.learn(marks, shifts, right=False)
    assert found.chance(marks, found.fresh()) < 0.2


def test_prior_counts_are_not_added_twice_by_processes_that_share_counts() -> None:
    known = {"one": {3: (18.0, 20.0)}}
    first, second = (Calibration(["one"], (), known) for _ in range(2))
    second.learn([(0, 3)], second.fresh(), right=False)
    stored = second.sync(first.sync(None))
    accepted, seen = stored["calibration/one"][3].tolist()
    assert (accepted, seen) == pytest.approx((18.0, 21.0), abs=0.1)
