"""The pace of a hybrid's steps: its own sequence's soon, all sequences' at first."""

from __future__ import annotations

import pytest

from adaptspec_plugins.hybrid.pace import Pace


def decode(everyone: Pace, tokens: int, steps: int) -> Pace:
    """One answer whose steps emit so many tokens in the time of a plain one."""
    own = everyone.fresh()
    for _ in range(steps):
        for pace in (everyone, own):
            pace.add(tokens, 1.0)
    return own


def test_one_answer_of_copies_hardly_changes_the_pace_of_the_next() -> None:
    everyone = Pace()
    for _ in range(10):
        decode(everyone, 1, 40)
    assert decode(everyone, 6, 40).tokens == pytest.approx(6, rel=0.2)
    assert everyone.fresh().tokens < 1.6


def test_a_sequence_soon_has_its_own_pace() -> None:
    everyone = Pace()
    for _ in range(10):
        decode(everyone, 6, 40)
    assert everyone.fresh().tokens > 5
    assert decode(everyone, 1, 8).tokens < 3


def test_the_pace_of_all_sequences_forgets_old_steps() -> None:
    everyone = Pace()
    for _ in range(30):
        decode(everyone, 1, 100)
    for _ in range(30):
        decode(everyone, 3, 100)
    assert everyone.tokens == pytest.approx(3, rel=0.1)
