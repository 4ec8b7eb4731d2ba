"""From a tune to its use: loaded with the same options, its profiles are found."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptspec_plugins
import adaptspec_profiles.plugin
from adaptspec.decoder import Decoder, load
from adaptspec.host import Host
from adaptspec.testing.fakes import tiny_module, tiny_tokenizer
from adaptspec.workloads import Prompt, Workload
from adaptspec_profiles import open_store
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.reporting.stored import build
from adaptspec_tuner.tune import tune

HOST = {"bundled": adaptspec_plugins, "profiles": adaptspec_profiles.plugin}


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield 1 if before > 1 else 2
    torch.set_num_threads(before)


@pytest.mark.slow
def test_loaded_as_it_was_tuned_a_model_finds_its_profiles(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_module("llama")
    for name, each in (("target", module), ("draft", tiny_module("llama", seed=1))):
        each.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.setattr(Host, "installed", classmethod(lambda cls: Host(HOST)))
    given: dict[str, Any] = {
        "draft_model": str(tmp_path / "draft"),
        "db": str(tmp_path / "p.db"),
        "dtype": "bfloat16",
        "threads": threads,
    }
    model = str(tmp_path / "target")
    prompts = [Prompt(str(i), text=f"w{i} w5 w6 w7 w{i} w5") for i in range(4)]
    result = tune(
        model,
        given["draft_model"],
        Workload("w", tuple(prompts)),
        TuneOptions(
            budget_trials=1,
            strategies=["draft_model"],
            max_new_tokens=6,
            dtype="bfloat16",
            threads=threads,
        ),
        db=given["db"],
    )
    # What was found of the model's bits is told, kept, and told again.
    said_of_output = "outputs equal plain decoding's bit for bit"
    assert said_of_output in result.notes
    with closing(open_store(given["db"])) as store:
        assert build(store).notes == [said_of_output]

    def said(decoder: Decoder) -> str:
        return decoder.choose().reason

    torch.set_num_threads(3 - threads)
    reason = said(load(model, **given))
    assert "nothing is reliably faster in time per answer on 'default'" in reason
    assert "elsewhere" not in reason
    assert "nothing is profiled" not in reason
    # Of what differs it says what to pass, or that it was measured otherwise.
    torch.set_num_threads(3 - threads)
    less = {**given, "threads": None}
    assert f"measured with threads {threads} (here {3 - threads})" in said(
        load(model, **less)
    )
    assert "load with dtype='bfloat16'" in said(
        load(model, **{**given, "dtype": "float32"})
    )
