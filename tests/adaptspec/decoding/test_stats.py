"""Figures that are worked out from steps."""

from __future__ import annotations

from adaptspec.decoding.stats import RunStats, StepStats
from adaptspec.token_tree import TokenTree


def step(accepted: int, depth: int, seconds: float) -> StepStats:
    return StepStats(depth, accepted, accepted + 1, seconds, 0.0, 0.0, depth)


def test_acceptance_by_position_counts_steps_that_reached_it() -> None:
    stats = RunStats(steps=[step(2, 3, 1.0), step(0, 1, 1.0), step(0, 0, 1.0)])
    assert stats.positions == [(1, 2), (1, 1), (0, 1)]
    assert RunStats().positions == []


def test_the_95th_percentile_shares_a_steps_time_among_its_tokens() -> None:
    assert RunStats().latency_p95 == 0
    # Nineteen tokens of 10 ms each, one of 100 ms: 95% took 10 ms at most.
    steps = [step(18, 18, 0.19), step(0, 0, 0.1)]
    assert round(RunStats(steps=steps).latency_p95, 6) == 10.0
    steps = [step(17, 17, 0.18), step(0, 0, 0.1), step(0, 0, 0.2)]
    assert round(RunStats(steps=steps).latency_p95, 6) == 100.0


def test_a_trees_depth_leaves_probes_out() -> None:
    tree = TokenTree((1, 2, 3, 4), (-1, 0, 0, 2), probes=frozenset({2, 3}))
    assert (max(tree.depths), tree.depth) == (2, 1)
