"""Our own engine and Hugging Face's, as engines that are tuned and compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from adaptspec.engines.inference_engine import Answer, EngineOptions
from adaptspec.errors import EngineError
from adaptspec.profile import PLAIN
from adaptspec.testing import InferenceEngineContract
from adaptspec.testing.fakes import hf_greedy
from adaptspec.workloads import Message, Prompt
from adaptspec_plugins.engines.in_process import InProcessEngine
from adaptspec_plugins.engines.ours import AdaptSpecEngine
from adaptspec_plugins.engines.transformers import TransformersEngine

PROMPTS = (
    Prompt("text", text="w5 w6 w7 w5 w6 w7 w5", raw=True),
    Prompt("chat", messages=(Message("user", "w9 w8 w9 w8"),)),
    Prompt("short", text="w3 w4", max_new_tokens=4),
)


class InProcess(InferenceEngineContract):
    """With the tiny models."""

    prompts = PROMPTS

    @pytest.fixture(autouse=True)
    def told(self, models: tuple[str, str]) -> None:
        """The models' folders."""
        self.options = EngineOptions(
            engine=self.engine_class.name, model=models[0], draft_model=models[1]
        )


class TestOurs(InProcess):
    """AdaptSpec's own."""

    engine_class = AdaptSpecEngine


class TestTransformers(InProcess):
    """Hugging Face's."""

    engine_class = TransformersEngine


@pytest.mark.parametrize("cls", [AdaptSpecEngine, TransformersEngine])
def test_answers_are_those_of_transformers_own_loop(
    cls: type[InProcessEngine], models: tuple[str, str]
) -> None:
    from adaptspec.model.loading import load_model

    model = load_model(models[0], accelerate=False)
    ids = PROMPTS[0].encode(model)
    expected = hf_greedy(model, ids, 12)
    with cls.open(EngineOptions(model=models[0])) as engine:
        (answer,) = engine.answer(PLAIN, {}, PROMPTS[:1], 12)
    assert list(answer.token_ids or ()) == expected


@pytest.mark.parametrize("cls", [AdaptSpecEngine, TransformersEngine])
def test_a_token_that_is_far_off_is_no_near_tie(
    cls: type[InProcessEngine], models: tuple[str, str]
) -> None:
    with cls.open(EngineOptions(model=models[0])) as engine:
        (answer,) = engine.answer(PLAIN, {}, PROMPTS[:1], 6)
        assert answer.token_ids is not None
        told = [
            engine.near_tie(PROMPTS[0], answer.token_ids[:3], answer.token_ids[3], one)
            for one in range(64)
        ]
    assert told.count(True) == 1  # itself


@pytest.mark.slow
def test_methods_that_need_a_draft_model_wait_for_one(models: tuple[str, str]) -> None:
    for cls, method in (
        (AdaptSpecEngine, "draft_model"),
        (TransformersEngine, "hf_assisted"),
    ):
        with cls.open(EngineOptions(model=models[0])) as engine:
            assert "draft model" in engine.unavailable[method]
            with pytest.raises(EngineError, match="draft model"):
                engine.answer(method, {}, PROMPTS[:1], 4)
        with cls.open(EngineOptions(model=models[0], draft_model=models[1])) as engine:
            assert method in {known.name for known in engine.methods}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"command": "x"}, "--engine-command says nothing to"),
        ({"python": "x"}, "--engine-python says nothing to"),
        ({"arguments": ["--x"]}, "--engine-argument says nothing to"),
        ({"context": 5}, "--context says nothing to"),
        ({"batch_threads": 1}, "--batch-threads says nothing to"),
        ({"api_key": "secret"}, "--api-key says nothing to .* got a key; leave it out"),
        ({"concurrency": 2}, "one request at a time"),
    ],
)
@pytest.mark.parametrize("cls", [AdaptSpecEngine, TransformersEngine])
def test_what_they_cannot_honour_is_refused(
    cls: type[InProcessEngine], options: dict[str, Any], match: str
) -> None:
    with pytest.raises(EngineError, match=match):
        cls.open(EngineOptions(**options))


def test_heads_are_refused_where_nothing_reads_them() -> None:
    with pytest.raises(EngineError, match="--heads says nothing to transformers"):
        TransformersEngine.open(EngineOptions(heads=["h"]))


def test_each_engine_decodes_with_threads_of_its_own(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    used: list[int] = []

    def counted(cls: type[InProcessEngine]) -> None:
        answer = cls._answer

        def counting(self: InProcessEngine, *asked: Any) -> Answer:
            used.append(torch.get_num_threads())
            return answer(self, *asked)

        monkeypatch.setattr(cls, "_answer", counting)

    counted(AdaptSpecEngine)
    counted(TransformersEngine)
    before = torch.get_num_threads()
    one, other = before + 1, before + 2
    options = EngineOptions(model=models[0], threads=one)
    with (
        AdaptSpecEngine.open(options) as ours,
        TransformersEngine.open(replace(options, threads=other)) as theirs,
        TransformersEngine.open(replace(options, threads=None)) as usual,
    ):
        engines = (ours, theirs, usual)
        assert [e.environment.threads for e in engines] == [one, other, before]
        for engine in (*engines, *reversed(engines)):
            engine.answer(PLAIN, {}, PROMPTS[:1], 2)
    assert used == [one, other, before, before, other, one]
    assert torch.get_num_threads() == before
