"""The noise of sampling: uniform, independent, a function of seed and position."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler, arrivals, key, race, uniforms, unit

CPU = torch.device("cpu")
PROBS = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05, 0.0])


def splitmix(state: int) -> int:
    """The published generator, in plain integers: the oracle of the tensor version."""
    mask = (1 << 64) - 1
    z = state & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(0, 200_000))
def test_tensor_noise_equals_the_integer_generator(state: int, index: int) -> None:
    found = float(uniforms(state, torch.tensor([index]))[0])
    counter = state + (index + 1) * 0x9E3779B97F4A7C15
    assert found == ((splitmix(counter) >> 11) + 0.5) * 2.0**-53


def test_noise_is_uniform_over_positions_and_over_tokens() -> None:
    over_positions = [unit(key(7, position, 2)) for position in range(4000)]
    over_tokens = uniforms(key(7, 11, 1), torch.arange(4000)).tolist()
    for sample in (over_positions, over_tokens):
        assert stats.kstest(sample, "uniform").pvalue > 1e-4


@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_streams_seeds_and_positions_have_different_noise(
    seed: int, position: int
) -> None:
    keys = {key(seed, position, s) for s in (1, 2, 3)}
    keys |= {key(seed + 1, position, 1), key(seed, position + 1, 1)}
    assert len(keys) == 5


@pytest.mark.slow
def test_a_race_samples_the_distribution_and_never_the_impossible() -> None:
    draws = [race(PROBS, key(3, position, 1)) for position in range(6000)]
    counts = [draws.count(token) for token in range(6)]
    assert counts[5] == 0
    expected = [6000 * float(p) for p in PROBS[:5]]
    assert stats.chisquare(counts[:5], expected).pvalue > 1e-4
    uniform = [sum(counts) / 5] * 5
    assert stats.chisquare(counts[:5], uniform).pvalue < 1e-9  # the test can fail


@pytest.mark.slow
def test_draws_without_replacement_follow_the_successive_distribution() -> None:
    sampler = Sampler(Processors(Controls(temperature=1.0), 1, CPU), seed=5)
    counts: dict[tuple[int, ...], int] = {}
    rounds = 6000
    for _ in range(rounds):
        pair = tuple(sampler.draw(PROBS, 2))
        counts[pair] = counts.get(pair, 0) + 1
    probs = PROBS.tolist()
    expected = {
        (a, b): rounds * probs[a] * probs[b] / (1 - probs[a])
        for a in range(5)
        for b in range(5)
        if a != b
    }
    observed = [counts.get(pair, 0) for pair in expected]
    assert sum(observed) == rounds
    assert stats.chisquare(observed, list(expected.values())).pvalue > 1e-4


def test_draws_stop_where_the_support_ends() -> None:
    sampler = Sampler(Processors(Controls(temperature=1.0), 1, CPU), seed=5)
    assert sorted(sampler.draw(PROBS, 9)) == [0, 1, 2, 3, 4]
    assert math.isinf(float(arrivals(PROBS, key(1))[5]))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_distribution_at_the_same_position_gives_the_same_token(
    temperature: float,
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    samplers = [
        Sampler(Processors(Controls(temperature=temperature), 3, CPU), seed=9)
        for _ in range(2)
    ]
    samplers[1].draw(PROBS, 1)  # what was drafted doesn't matter
    ids = [1, 2, 3]
    assert samplers[0].choose(ids, logits) == samplers[1].choose(ids, logits)
