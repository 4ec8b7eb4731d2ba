"""Of what is decoded nothing lies on a disk afterwards, unless that is asked for."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import adaptspec
from adaptspec.decoder import Decoder
from adaptspec.environment import environment_of
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import noisy_draft, random_ids, tiny_module, tiny_tokenizer
from adaptspec.testing.stores import example_profile
from decided import keep

VOCAB = 5000  # so that no four ids come up by chance
STRATEGIES = ("suffix", "token_recycling", "hybrid", "draft_model", "prompt_lookup")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with nothing in it, where everything that is written goes."""
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def decoded(home: Path, **more: Any) -> list[list[int]]:
    """Decode with the user's own store, chosen and asked for; prompts and outputs."""
    model = LanguageModel(
        tiny_module("llama", vocab_size=VOCAB), tiny_tokenizer(VOCAB), "tiny"
    )
    draft = noisy_draft(model)
    with closing(Host.installed().open_store(None)) as store:
        chosen = example_profile(
            environment=environment_of(model, draft), strategy="suffix", params={}
        )
        keep(store, [chosen])
    decoder = adaptspec.load(model, draft, **more)
    kept: list[list[int]] = []
    for number, strategy in enumerate((None, *STRATEGIES)):
        prompt = random_ids(12, seed=number, vocab_size=VOCAB)
        asked: dict[str, Any] = {"strategy": strategy, "max_new_tokens": 24}
        if strategy is None:
            asked["prompt_class"] = "chat"
        stream = decoder.stream(prompt, temperature=0, **asked)
        assert "".join(stream)
        assert stream.result.choice.strategy == strategy or strategy is None
        kept += [prompt, stream.result.token_ids]
    assert decoder.choose("chat").strategy == "suffix"
    decoder.save()
    assert_recorded(decoder)
    return kept


def assert_recorded(decoder: Decoder) -> None:
    """The sums of what requests took were written, so that something is looked at."""
    with closing(decoder.host.open_store(None)) as store:
        assert [use.requests for use in store.uses()] == [1]


def found(home: Path, sequences: Sequence[Sequence[int]]) -> set[str]:
    """Names of the files that hold four tokens in a row, as text or numbers."""
    needles: list[bytes] = []
    for ids in sequences:
        for start in range(0, len(ids) - 3, 2):
            four = list(ids[start : start + 4])
            needles += [struct.pack(f"<4{kind}", *four) for kind in "iq"]
            needles.append(" ".join(f"w{token}" for token in four).encode())
            needles.append(json.dumps(four)[1:-1].encode())
    files = [path for path in home.rglob("*") if path.is_file()]
    assert files
    holding = set()
    for path in files:
        content = path.read_bytes()
        if any(needle in content for needle in needles):
            holding.add(path.name)
    return holding


@pytest.mark.slow
def test_nothing_of_prompts_and_outputs_is_written(home: Path) -> None:
    assert found(home, decoded(home)) == set()


@pytest.mark.slow
def test_what_is_learnt_is_written_where_that_is_asked_for(home: Path) -> None:
    """And so the test above would find it."""
    assert "suffix.safetensors" in found(home, decoded(home, learn=True))
