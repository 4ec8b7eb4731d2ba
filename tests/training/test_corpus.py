"""Answers on disk survive kills and refuse what isn't theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptspec.errors import TrainingError
from adaptspec_training.conversations import Example
from adaptspec_training.corpus import ANSWERS, FEATURES, Corpus, keeps_features


def example(name: str, prompt: int, answer: int) -> Example:
    return Example(name, tuple(range(prompt + answer)), ((prompt, prompt + answer),))


def filled(folder: Path, batches: int = 3) -> tuple[Corpus, list[torch.Tensor]]:
    corpus = Corpus(folder, 4, torch.bfloat16, "made")
    kept = []
    for batch in range(batches):
        examples = [example(f"{batch}-{i}", 2 + i, 3 + batch) for i in range(2)]
        states = [torch.randn(3 + batch, 4).bfloat16() for _ in examples]
        corpus.append(examples, states)
        kept += states
    return corpus, kept


def test_what_was_appended_is_read_back_by_another_process(tmp_path: Path) -> None:
    corpus, states = filled(tmp_path)
    again = Corpus(tmp_path, 4, torch.bfloat16, "made")
    assert again.examples == corpus.examples
    assert again.batches == 3
    for index, state in enumerate(states):
        assert torch.equal(again.hidden(index), state)
        assert torch.equal(corpus.hidden(index), state)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), features=st.booleans())
def test_a_batch_that_a_kill_cut_off_is_dropped_whole(
    tmp_path: Path, cut: float, features: bool
) -> None:
    folder = tmp_path / f"{cut}-{features}"
    filled(folder, 2)
    lengths = {name: (folder / name).stat().st_size for name in (ANSWERS, FEATURES)}
    filled_one_more(folder)
    # Features are written first: a kill leaves none, some or all of them, and then
    # none, some or all of the lines.
    for name in (ANSWERS, FEATURES):
        grown = (folder / name).stat().st_size - lengths[name]
        if name == ANSWERS:
            share = 0.0 if features else cut
        else:
            share = cut if features else 1.0
        os.truncate(folder / name, lengths[name] + int(grown * share))
    again = Corpus(folder, 4, torch.bfloat16, "made")
    complete = not features and cut == 1.0
    assert again.batches == (3 if complete else 2)
    assert len(again.examples) == (5 if complete else 4)
    again.append([example("next", 1, 2)], [torch.ones(2, 4)])
    last = Corpus(folder, 4, torch.bfloat16, "made")
    assert torch.equal(last.hidden(len(last.examples) - 1), torch.ones(2, 4).bfloat16())


def filled_one_more(folder: Path) -> None:
    corpus = Corpus(folder, 4, torch.bfloat16, "made")
    corpus.append([example("more", 3, 5)], [torch.randn(5, 4)])


def test_answers_of_other_options_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(TrainingError, match=r"other options or data.*--fresh"):
        Corpus(tmp_path, 4, torch.bfloat16, "another")


def test_whether_features_are_kept_is_settled_when_the_folder_is_made(
    tmp_path: Path,
) -> None:
    assert keeps_features(tmp_path / "none") is None
    filled(tmp_path / "kept")
    assert keeps_features(tmp_path / "kept") is True
    Corpus(tmp_path / "bare", 0, torch.bfloat16, "made").append(
        [example("a", 2, 3)], []
    )
    assert keeps_features(tmp_path / "bare") is False
    with pytest.raises(TrainingError, match=r"without hidden states.*--fresh"):
        Corpus(tmp_path / "bare", 4, torch.bfloat16, "made")


def test_features_that_are_no_longer_wanted_are_dropped_and_the_answers_stay(
    tmp_path: Path,
) -> None:
    corpus, _ = filled(tmp_path)
    bare = Corpus(tmp_path, 0, torch.bfloat16, "made")
    assert bare.examples == corpus.examples
    assert not (tmp_path / FEATURES).exists()
    assert keeps_features(tmp_path) is False
    bare.append([example("more", 2, 3)], [])
    assert len(Corpus(tmp_path, 0, torch.bfloat16, "made").examples) == 7


def test_a_file_without_a_first_line_is_damaged(tmp_path: Path) -> None:
    (tmp_path / ANSWERS).write_text("")
    with pytest.raises(TrainingError, match="damaged"):
        keeps_features(tmp_path)
    (tmp_path / ANSWERS).write_text("[1]\n")
    with pytest.raises(TrainingError, match="damaged"):
        Corpus(tmp_path, 0, torch.bfloat16, "made")


def test_damage_is_named(tmp_path: Path) -> None:
    filled(tmp_path)
    os.truncate(tmp_path / FEATURES, 10)
    with pytest.raises(TrainingError, match=r"features\.bin must hold \d+ bytes"):
        Corpus(tmp_path, 4, torch.bfloat16, "made")
    text = (tmp_path / ANSWERS).read_text().replace('"rows": ', '"rows": 9', 1)
    (tmp_path / ANSWERS).write_text(text)
    with pytest.raises(TrainingError, match="damaged"):
        Corpus(tmp_path, 4, torch.bfloat16, "made")


def test_features_and_positions_must_agree(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, 4, torch.float32, "made")
    with pytest.raises(ValueError, match="one feature row per position"):
        corpus.append([example("a", 2, 3)], [torch.ones(2, 4)])


def test_a_full_disk_is_told_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    corpus = Corpus(tmp_path, 4, torch.float32, "made")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "adaptspec_training.corpus.shutil.disk_usage",
        lambda _: usage._replace(free=1 << 20),
    )
    with pytest.raises(TrainingError, match="--features recompute"):
        corpus.append([example("a", 2, 3)], [torch.ones(3, 4)])
