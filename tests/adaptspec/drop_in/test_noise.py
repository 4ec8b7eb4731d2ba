"""Numbers are torch's own, in its order, whoever asks first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.drop_in.noise import Noise
from adaptspec.drop_in.speed_up import SpeedUp
from adaptspec.testing.strategies import fits, toy_distribution, toy_pair
from foretold import foretelling

CPU = torch.device("cpu")


def distributions(steps: int, rows: int, vocab: int) -> torch.Tensor:
    """``[steps, rows, vocab]``, with tokens that can't come."""
    generator = torch.Generator().manual_seed(vocab)
    scores = torch.randn((steps, rows, vocab), generator=generator) * 3
    scores[:, :, vocab // 2] = -torch.inf
    return scores.softmax(-1)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    vocab=st.sampled_from([2, 7, 64, 5000]),
    ahead=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_picks_are_multinomials_although_drafts_ask_ahead(
    rows: int, vocab: int, ahead: int, seed: int
) -> None:
    steps = 4
    probs = distributions(steps, rows, vocab)
    torch.manual_seed(seed)
    expected = [torch.multinomial(p, 1)[:, 0].tolist() for p in probs]
    after = torch.rand(3)
    torch.manual_seed(seed)
    noise = Noise(rows, CPU)
    picked = []
    for step in range(steps):
        picked.append([noise.pick(probs[step, row], step, row) for row in range(rows)])
        noise.pick(probs[step, 0, : vocab - 1], step + ahead, 0)  # a draft's question
        noise.forget(step + 1)
    assert picked == expected
    noise.rewind(steps)
    assert torch.equal(torch.rand(3), after)


@pytest.fixture
def half() -> Iterator[None]:
    """A default type of numbers that isn't the model's."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("half")
def test_picks_are_multinomials_whatever_type_of_numbers_is_the_default() -> None:
    probs = distributions(20, 1, 64).float()
    torch.manual_seed(0)
    expected = [torch.multinomial(p, 1)[0].tolist() for p in probs]
    torch.manual_seed(0)
    noise = Noise(1, CPU)
    assert [[noise.pick(p[0], n, 0)] for n, p in enumerate(probs)] == expected


def test_a_generator_that_others_drew_from_is_not_set_back() -> None:
    torch.manual_seed(0)
    noise = Noise(1, CPU)
    noise.pick(torch.ones(4) / 4, 5, 0)
    torch.rand(1)
    state = torch.get_rng_state()
    noise.rewind(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_for_other_noise_follows_the_generator_and_leaves_it() -> None:
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        seeds.append(Noise(1, CPU).seed())
        assert torch.equal(torch.get_rng_state(), state)
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.slow
def test_drafts_drawn_at_random_leave_the_distribution_as_it_is() -> None:
    target, draft = toy_pair()
    decoder = foretelling(target.source, draft_model=draft.source)
    speedup = SpeedUp(
        target.source,
        decoder,
        strategy="draft_model",
        params={"draft_sampling": "independent"},
    )
    prompt = [1, 4, 2]
    seen: Counter[tuple[int, ...]] = Counter()
    torch.manual_seed(0)
    for _ in range(600):
        output = speedup(
            torch.tensor([prompt]),
            max_new_tokens=3,
            do_sample=True,
            temperature=1.5,
            top_k=0,
        )
        seen[tuple(output[0, 4:].tolist())] += 1
    assert fits(seen, toy_distribution(target, prompt, temperature=1.5))
