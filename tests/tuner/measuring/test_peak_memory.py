"""Whose memory a draft model, trained heads and other engines' models are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adaptspec_plugins
from adaptspec.acceleration.linear import accelerate_linears
from adaptspec.decoding.engine import Engine
from adaptspec.heads.protocol import bytes_of
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.params import Params
from adaptspec.strategy import (
    Baseline,
    BaselineRun,
    Drafter,
    Requirements,
    Strategy,
    Target,
)
from adaptspec.testing.fakes import noisy_draft, tiny_model, tiny_tokenizer
from adaptspec.workloads import Prompt
from adaptspec_tuner.measuring.peak_memory import weights_of
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Profiler, Setting


class WordParams(Params):
    draft_words: int = 3


class Words(Strategy):
    """Its parameter is about drafts, but it never asks a model for one."""

    name = "words"
    summary = "drafts words"
    Params = WordParams

    def start(self, target: Target) -> Drafter:
        raise NotImplementedError


class SwitchParams(Params):
    ask: bool = False


class Switch(Strategy):
    """A parameter decides whether it runs the draft model."""

    name = "switch"
    summary = "drafts where it may"
    Params = SwitchParams
    params: SwitchParams

    def start(self, target: Target) -> Drafter:
        raise NotImplementedError

    def uses_draft(self, model: LanguageModel, draft: LanguageModel) -> bool:
        return bool(self.params.ask)


class Other(Baseline):
    name = "other"
    summary = "another engine"

    def run(self, *arguments: Any) -> BaselineRun:
        raise NotImplementedError


class OtherWithDraft(Other):
    name = "other_with_draft"
    requires = Requirements(draft="same vocabulary")


class Plugin:
    @staticmethod
    @hookimpl
    def register_strategies() -> list[type[Strategy]]:
        return [Words, Switch]

    @staticmethod
    @hookimpl
    def register_baselines() -> list[type[Baseline]]:
        return [Other, OtherWithDraft]


@pytest.fixture(scope="module")
def host() -> Host:
    return Host({"bundled": adaptspec_plugins, "mine": Plugin})


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    target = tiny_model("llama", tokenizer=tiny_tokenizer())
    return target, noisy_draft(target)


def parameters(model: LanguageModel) -> int:
    """Counted by the caller's own module."""
    source: Any = model.source
    return sum(p.numel() * p.element_size() for p in source.parameters())


@pytest.mark.parametrize(
    ("setting", "asks"),
    [
        (PLAIN_SETTING, False),
        (Setting("prompt_lookup"), False),
        (Setting("words", {"draft_words": 3}), False),
        (Setting("switch", {"ask": False}), False),
        (Setting("switch", {"ask": True}), True),
        (Setting("draft_model"), True),
        (Setting("draft_tree"), True),
        (Setting("universal_draft"), True),
        (Setting("hybrid", {"use_draft": True}), True),
        (Setting("hybrid"), True),
        (Setting("hybrid", {"use_draft": False}), False),
    ],
)
def test_a_drafts_memory_counts_for_the_settings_that_run_it_alone(
    setting: Setting, asks: bool, host: Host, pair: tuple[LanguageModel, LanguageModel]
) -> None:
    target, draft = pair
    profiler = Profiler(Engine(target, draft), host, 4)
    unused = profiler._unused(setting)
    buffers = sum(b.nbytes for b in draft.model.buffers())
    assert unused == (0 if asks else parameters(draft) + buffers)


def test_models_of_other_engines_count_for_these_alone(
    host: Host, pair: tuple[LanguageModel, LanguageModel]
) -> None:
    target, draft = pair
    theirs, their_draft = tiny_model("llama", seed=5), tiny_model("llama", seed=6)
    profiler = Profiler(Engine(target, draft), host, 4, theirs, their_draft)
    sizes = {
        name: sum(weights_of([model.model]).values())
        for name, model in zip(
            ("target", "draft", "theirs", "their draft"),
            (target, draft, theirs, their_draft),
            strict=True,
        )
    }
    assert all(sizes.values())
    other = Setting("other", baseline=True)
    drafting = Setting("other_with_draft", baseline=True)
    ours = sizes["target"] + sizes["draft"]
    assert profiler._unused(other) == ours + sizes["their draft"]
    assert profiler._unused(drafting) == ours
    assert profiler._unused(PLAIN_SETTING) == (
        sizes["draft"] + sizes["theirs"] + sizes["their draft"]
    )


def test_packed_weights_are_counted_and_shared_ones_once() -> None:
    linear = nn.Linear(32, 64)
    assert sum(weights_of([linear, linear]).values()) == 4 * (64 * 32 + 64)
    model = nn.Sequential(linear, linear)
    accelerate_linears(model, own_weights=True)
    assert sum(weights_of([model]).values()) == 4 * (64 * 32 + 64)


class Bare:
    """What docs/hooks.md says will do."""

    kind, name, digest = "bare", "mine", "d1"


def test_heads_that_do_not_say_their_size_are_measured(host: Host) -> None:
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    model.attach(Bare())
    profiler = Profiler(Engine(model), host, 4)
    prompt = Prompt("1", text="w2 w3 w4")
    assert len(profiler.measure(PLAIN_SETTING, prompt).tokens) == 4
    assert profiler._unused(PLAIN_SETTING) == 0
    sized: Any = Bare()
    sized.nbytes = torch.zeros(5).nbytes
    assert (bytes_of(Bare()), bytes_of(sized)) == (0, 20)
