"""llama.cpp's engine on the real program, where the environment names one.

ADAPTSPEC_LLAMA_SERVER is a llama-server, ADAPTSPEC_GGUF a small model file that has a
chat template.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.engines.processes import start_server
from adaptspec.errors import EngineError
from adaptspec.workloads import Prompt
from adaptspec_plugins.engines.llama_cpp.engine import LlamaCpp
from adaptspec_plugins.engines.llama_cpp.settings import all_methods, arguments_of

PROGRAM = os.environ.get("ADAPTSPEC_LLAMA_SERVER", "")
MODEL = os.environ.get("ADAPTSPEC_GGUF", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PROGRAM and MODEL),
        reason="needs ADAPTSPEC_LLAMA_SERVER and ADAPTSPEC_GGUF",
    ),
]
REPEATING = Prompt(
    "repeating",
    text="one two three four five six seven " * 5 + "one two",
    raw=True,
)
EMOJI = Prompt("emoji", text="Say only this: 🙂🙃🙂🙃 日本語 你好")


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaCpp]:
    """The model as its own draft model, so that drafts are accepted."""
    options = EngineOptions(
        model=MODEL, draft_model=MODEL, command=PROGRAM, threads=1, context=600
    )
    opened = LlamaCpp.open(options)
    with opened:
        yield opened


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("ngram_simple", {"size_n": 3, "size_m": 6}),
        ("ngram_map_k", {"size_n": 3, "size_m": 6}),
        ("ngram_map_k4v", {"size_n": 3, "size_m": 6}),
        ("ngram_mod", {"n_match": 4, "n_min": 1, "n_max": 6}),
        ("ngram_cache", {}),
        ("draft_simple", {"draft_n_max": 4}),
        ("ngram_simple_draft_simple", {"size_n": 3, "size_m": 6}),
        ("ngram_map_k4v_draft_simple", {"size_n": 3, "size_m": 6}),
        ("ngram_map_k4v_ngram_mod", {"size_n": 3, "size_m": 6}),
    ],
)
def test_every_method_drafts_and_keeps_plain_decodings_tokens(
    method: str, params: dict[str, int], engine: LlamaCpp
) -> None:
    if method in engine.unavailable:
        pytest.skip(engine.unavailable[method])
    (plain,) = engine.answer("autoregressive", {}, [REPEATING], 24)
    (answer,) = engine.answer(method, params, [REPEATING], 24)
    assert answer.accepted > 0
    assert answer.forwards < plain.forwards == 23
    assert plain.token_ids is not None
    assert answer.token_ids is not None
    pairs = enumerate(zip(plain.token_ids, answer.token_ids, strict=False))
    for at, (one, other) in pairs:
        if one != other:
            assert engine.near_tie(REPEATING, plain.token_ids[:at], one, other)
            break


@pytest.mark.parametrize("method", ["ngram_map_k", "ngram_map_k4v"])
def test_a_prompt_finds_as_much_after_others_as_in_a_new_server(
    method: str, engine: LlamaCpp
) -> None:
    if method in engine.unavailable:
        pytest.skip(engine.unavailable[method])
    params = {"size_n": 2, "size_m": 4}
    told = []
    for prompt in (REPEATING, EMOJI, REPEATING, REPEATING):
        (answer,) = engine.answer(method, params, [prompt], 24)
        told.append((answer.proposed, answer.accepted))
    assert told[0][1] > 0
    assert told[0] == told[2] == told[3]


def test_no_token_of_a_divided_character_is_lost(engine: LlamaCpp) -> None:
    (answer,) = engine.answer("autoregressive", {}, [EMOJI], 20)
    assert answer.token_ids is not None
    assert len(answer.token_ids) == answer.tokens == answer.forwards + 1
    server = engine._server("autoregressive", {})
    text = server._ask("POST", "/detokenize", {"tokens": list(answer.token_ids)})
    assert text["content"].startswith(answer.text.rstrip("\ufffd"))


def test_two_prompts_at_a_time_have_their_own_answers() -> None:
    options = EngineOptions(
        model=MODEL, command=PROGRAM, threads=1, context=400, concurrency=2
    )
    with LlamaCpp.open(options) as engine:
        both = engine.answer("autoregressive", {}, [REPEATING, EMOJI], 6)
        alone = [
            engine.answer("autoregressive", {}, [p], 6)[0] for p in (REPEATING, EMOJI)
        ]
    # Later tokens may differ where two forwards round differently.
    firsts = [[answer.token_ids[:1] for answer in told] for told in (both, alone)]  # type: ignore[index]
    assert firsts[0] == firsts[1]
    assert firsts[0][0] != firsts[0][1]


def test_every_option_of_every_method_is_known_to_the_program() -> None:
    """It reads its options before the model, which isn't there."""
    for name in all_methods():
        words = arguments_of(name, {})
        done = subprocess.run(
            [PROGRAM, "-m", "/no/such.gguf", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "invalid argument" not in done.stdout + done.stderr, name
        assert "/no/such.gguf" in done.stdout + done.stderr, name


def test_the_printed_command_starts_a_server(engine: LlamaCpp) -> None:
    launch = engine.launch("ngram_simple", {"size_n": 4})
    with start_server(
        "llama-server", lambda port: [*launch.command, "--port", str(port)]
    ) as server:
        assert server.ended is None


def test_a_draft_model_of_other_words_is_refused() -> None:
    other = os.environ.get("ADAPTSPEC_OTHER_GGUF")
    if not other:
        pytest.skip("needs ADAPTSPEC_OTHER_GGUF, a model of another vocabulary")
    options = EngineOptions(
        model=MODEL, draft_model=other, command=PROGRAM, threads=1, context=300
    )
    with (
        LlamaCpp.open(options) as misled,
        pytest.raises(EngineError, match=r"without speculation.*vocab"),
    ):
        misled.answer("draft_simple", {}, [REPEATING], 2)
