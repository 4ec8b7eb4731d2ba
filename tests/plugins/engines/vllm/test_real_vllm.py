"""The real vLLM, where there is one, with the real SmolLM2."""

from __future__ import annotations

import os

import psutil  # type: ignore[import-untyped]
import pytest

from adaptspec.default_model import default_model_path
from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.profile import PLAIN
from adaptspec.workloads import Prompt
from adaptspec_plugins.engines.vllm.engine import VLLM

VARIABLE = "ADAPTSPEC_VLLM_PYTHON"
LIST = "apple, pear, plum, cherry, fig, "
PROMPTS = [
    Prompt("repeats", text=f"Repeat this list: {LIST * 4}"),
    Prompt("raw", text="def fibonacci(n):\n", raw=True),
]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"{VARIABLE} names no Python of an environment with vLLM",
)
def test_speculation_gives_the_plain_answers_in_fewer_forwards() -> None:
    options = EngineOptions(
        engine="vllm",
        model=str(default_model_path()),
        python=os.environ[VARIABLE],
        context=512,
        concurrency=2,
    )
    with VLLM.open(options) as engine:
        plain = engine.answer(PLAIN, {}, PROMPTS, 24)
        drafted = engine.answer("ngram", {"prompt_lookup_min": 2}, PROMPTS, 24)
        for prompt, one, other in zip(PROMPTS, plain, drafted, strict=True):
            assert one.token_ids is not None
            assert other.token_ids is not None
            assert (len(one.token_ids), one.forwards) == (one.tokens, one.tokens - 1)
            pairs = zip(one.token_ids, other.token_ids, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if at is not None:
                tokens = (one.token_ids[at], other.token_ids[at])
                assert engine.near_tie(prompt, one.token_ids[:at], *tokens)
        assert drafted[0].forwards < plain[0].forwards
        assert 0 < sum(a.accepted for a in drafted) <= sum(a.proposed for a in drafted)
    left = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    assert not any(str(default_model_path()) in command for command in left)
