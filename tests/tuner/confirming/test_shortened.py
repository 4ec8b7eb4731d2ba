"""Finalists left out where there is no time for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from adaptspec_tuner.confirming.ahead import shortened
from adaptspec_tuner.confirming.finalists import Finalist
from adaptspec_tuner.measuring.profiler import Setting

SETTINGS = [Setting("draft", {"length": length}) for length in (1, 2, 4, 8)]


def takes(kept: Mapping[str, Sequence[Finalist]]) -> float:
    """Ten seconds a start, and one each answer."""
    starts = {f.setting.key for found in kept.values() for f in found}
    return 10.0 * len(starts) + sum(map(len, kept.values()))


def of(**ratios: Sequence[float]) -> dict[str, list[Finalist]]:
    """Class -> finalists with the ratio of each setting; 0 of those that aren't."""
    return {
        name: [Finalist(r, s) for r, s in zip(found, SETTINGS, strict=False) if r > 0]
        for name, found in ratios.items()
    }


RATIOS = st.lists(st.floats(0.3, 3.0), min_size=1, max_size=4)


@given(st.dictionaries(st.sampled_from("abc"), RATIOS, min_size=1), st.floats(0, 60))
def test_it_fits_or_cannot_and_no_class_is_left_without_any(
    ratios: dict[str, list[float]], left: float
) -> None:
    given_all = of(**ratios)
    kept = shortened(given_all, takes, left)
    assert set(kept) == set(given_all)
    assert all(kept.values())
    assert all(one in given_all[name] for name in kept for one in kept[name])
    if takes(kept) > left:
        assert all(len(found) == 1 for found in kept.values())
    if takes(given_all) <= left:
        assert kept == given_all


def test_what_gains_least_goes_first() -> None:
    found = of(chat=[0.8, 1.05], code=[1.5, 1.4], math=[1.3, 1.1])
    # Time for one start: the setting that is best over all classes.
    kept = shortened(found, takes, 14.0)
    assert {f.setting.key for f in kept["code"]} == {SETTINGS[0].key}
    assert {f.setting.key for f in kept["math"]} == {SETTINGS[0].key}
    # Time for both starts, but not for every answer: losing ones are left out.
    kept = shortened(found, takes, 25.0)
    assert [f.ratio for f in kept["chat"]] == [1.05]
    assert [f.ratio for f in kept["code"]] == [1.5, 1.4]
