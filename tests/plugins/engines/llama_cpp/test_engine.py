"""llama.cpp's engine against a program that behaves as its server does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.engines.processes import start_server
from adaptspec.errors import EngineError
from adaptspec.host import Host
from adaptspec.workloads import Message, Prompt
from adaptspec_plugins.engines.llama_cpp.engine import LlamaCpp
from adaptspec_plugins.engines.llama_cpp.server import LlamaServer
from gguf_files import write_gguf

pytestmark = pytest.mark.slow

OpenEngine = Callable[..., LlamaCpp]
PLAIN = "autoregressive"
TEXT = Prompt("t", text="abc", raw=True)


def option(words: Sequence[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_it_is_registered() -> None:
    assert Host.installed().engines["llama.cpp"] is LlamaCpp


def test_plain_decoding_answers(open_engine: OpenEngine, fake: Any) -> None:
    engine = open_engine(threads=3)
    assert fake.starts == []  # opening starts nothing
    (answer,) = engine.answer(PLAIN, {}, [TEXT], 4)
    assert answer.text == "defg"
    assert answer.token_ids == [ord(c) for c in "defg"]
    assert (answer.tokens, answer.forwards) == (4, 3)
    assert (answer.proposed, answer.accepted) == (0, 0)
    assert 0 < answer.seconds_to_first < answer.seconds
    assert answer.seconds - answer.seconds_to_first == pytest.approx(0.25e-3)
    ((_, words),) = fake.starts
    assert option(words, "-t") == option(words, "-tb") == "3"
    assert option(words, "-c") == "512"  # 300 and what llama.cpp rounds to
    assert "--spec-type" not in words


def test_threads_are_tried_where_none_is_told(
    open_engine: OpenEngine, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "adaptspec_plugins.engines.llama_cpp.engine"
    monkeypatch.setattr(f"{module}.usable_cores", lambda: 4)
    monkeypatch.setattr(f"{module}.usable_processors", lambda: 8)
    assert open_engine(threads=3).thread_counts == ()
    assert open_engine(batch_threads=3).thread_counts == ()
    engine = open_engine()
    assert engine.thread_counts == [4, 8, 2]
    engine.use_threads(2, 8)
    engine.answer(PLAIN, {}, [TEXT], 2)
    ((_, words),) = fake.starts
    assert (option(words, "-t"), option(words, "-tb")) == ("2", "8")
    assert engine.environment.threads == 2
    printed = list(engine.launch(PLAIN, {}).command)
    assert (option(printed, "-t"), option(printed, "-tb")) == ("2", "8")


def test_acceptance_and_forwards_are_told(open_engine: OpenEngine) -> None:
    (answer,) = open_engine().answer("ngram_simple", {"size_n": 3}, [TEXT], 8)
    assert (answer.proposed, answer.accepted) == (16, 4)
    assert answer.forwards == 8 - 1 - 4


def test_prompts_are_read_as_the_model_reads_them(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    engine = open_engine()
    chat = (Message("system", "x"), Message("user", "y"))
    tools = ({"name": "tool"},)
    prompts = {
        "c": Prompt("raw", text="abc", raw=True),
        "d": Prompt("text", text="abcd"),
        "y": Prompt("chat", messages=chat),
        "z": Prompt("tools", messages=(Message("user", "z"),), tools=tools),
    }
    for last, prompt in prompts.items():
        (answer,) = engine.answer(PLAIN, {}, [prompt], 1)
        assert answer.text == chr(ord(last) + 1)
    read = {p.id: "".join(map(chr, ids)) for p, ids in engine._encoded.items()}
    assert read == {
        "raw": "abc",
        "text": "<user>abcd",
        "chat": "<system>x<user>y",
        "tools": "[tool]<user>z",
    }
    bare = open_engine(model=str(write_gguf(tmp_path / "bare.gguf", template=None)))
    (answer,) = bare.answer(PLAIN, {}, [Prompt("text", text="q")], 1)
    assert list(bare._encoded.values()) == [[ord("q")]]
    with pytest.raises(
        EngineError,
        match=r"'chat' is a chat, but the model file has .*give one by --engine-arg",
    ):
        bare.answer(PLAIN, {}, [prompts["y"]], 1)


def test_a_chat_template_may_come_with_the_users_arguments(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    bare = str(write_gguf(tmp_path / "bare.gguf", template=None))
    words = ["--chat-template-file", "template.jinja"]
    engine = open_engine(model=bare, arguments=words)
    for prompt in (
        Prompt("chat", messages=(Message("user", "y"),)),
        Prompt("text", text="y"),
    ):
        engine.answer(PLAIN, {}, [prompt], 1)
        assert "".join(map(chr, engine._encoded[prompt])) == "<user>y"


def test_a_prompts_own_length_counts(open_engine: OpenEngine) -> None:
    prompt = Prompt("own", text="a", raw=True, max_new_tokens=2)
    assert open_engine().answer(PLAIN, {}, [prompt], 9)[0].tokens == 2


def test_prompts_are_answered_at_the_same_time_in_their_order(
    open_engine: OpenEngine, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_TOGETHER", "3")
    engine = open_engine(concurrency=3)
    prompts = [Prompt(c, text=c, raw=True) for c in "kam"]
    answers = engine.answer(PLAIN, {}, prompts, 1)
    assert [a.text for a in answers] == ["l", "b", "n"]
    ((_, words),) = fake.starts
    assert (option(words, "-np"), option(words, "-c")) == ("3", "1536")


def test_more_prompts_than_slots_are_refused(open_engine: OpenEngine) -> None:
    with pytest.raises(EngineError, match=r"2 prompts at the same time need.*of 1"):
        open_engine().answer(PLAIN, {}, [TEXT, TEXT], 1)


def test_a_prompt_that_does_not_fit_its_slot_is_refused(
    open_engine: OpenEngine,
) -> None:
    engine = open_engine()
    prompt = Prompt("long", text="x" * 500, raw=True)
    assert engine.answer(PLAIN, {}, [prompt], 11)[0].tokens == 11
    with pytest.raises(
        EngineError, match=r"'long' has 500 tokens and may get 12 more.*512"
    ):
        engine.answer(PLAIN, {}, [prompt], 12)


def test_a_setting_is_started_once(open_engine: OpenEngine, fake: Any) -> None:
    engine = open_engine()
    for params in ({"size_n": 3, "size_m": 2}, {"size_n": 3, "size_m": 3}, {}):
        for _ in range(2):
            engine.answer("ngram_simple", params, [TEXT], 1)
    # The first two say the same, as no shorter draft is ever made.
    sizes = [option(words, "--spec-ngram-simple-size-m") for _, words in fake.starts]
    assert sizes == ["3", "48"]


def test_the_setting_used_longest_ago_gives_way(
    open_engine: OpenEngine, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCpp, "room", 2)
    engine = open_engine()
    one: tuple[str, dict[str, int]] = ("ngram_simple", {"size_n": 3})
    other: tuple[str, dict[str, int]] = ("ngram_cache", {})
    for method, params in (one, (PLAIN, {}), one, other, one):
        engine.answer(method, params, [TEXT], 1)
    first, plain, third = (pid for pid, _ in fake.starts)
    assert len(fake.starts) == 3
    assert not psutil.pid_exists(plain)
    assert psutil.pid_exists(first)
    assert psutil.pid_exists(third)


def test_memory_of_earlier_requests_never_answers_the_same_prompt(
    open_engine: OpenEngine, fake: Any
) -> None:
    engine = open_engine()
    other = Prompt("o", text="xyz", raw=True)
    for prompt in (TEXT, other, TEXT):
        engine.answer("ngram_mod", {}, [prompt], 1)
    assert len(fake.starts) == 2
    for _ in range(3):
        engine.answer("ngram_simple", {}, [TEXT], 1)
    assert len(fake.starts) == 3


def test_a_shorter_answer_to_a_prompt_counts_as_an_earlier_one(
    open_engine: OpenEngine, fake: Any
) -> None:
    engine = open_engine()
    short = Prompt("s", text=TEXT.text, raw=True, max_new_tokens=1)
    for prompt in (short, TEXT):
        engine.answer("ngram_mod", {}, [prompt], 2)
    assert len(fake.starts) == 2


SHORT = [0, 0]


def test_every_slot_of_every_start_is_warm_before_what_counts(
    open_engine: OpenEngine, fake: Any
) -> None:
    engine = open_engine(concurrency=2)
    for _ in range(2):  # the second one starts again
        engine.answer("ngram_mod", {}, [TEXT], 1)
    (first, _), (second, _) = fake.starts
    abc = [ord(c) for c in "abc"]
    assert fake.asked == [
        (pid, slot, tokens)
        for pid in (first, second)
        for slot, tokens in ((0, SHORT), (1, SHORT), (0, abc))
    ]


def test_maps_of_n_grams_are_emptied_before_each_prompt(
    open_engine: OpenEngine, fake: Any
) -> None:
    engine = open_engine(concurrency=2)
    prompts = [Prompt(c, text=c, raw=True) for c in "kam"]
    engine.answer("ngram_map_k4v", {}, prompts[:1], 1)
    engine.answer("ngram_map_k4v", {}, prompts[1:], 1)
    assert len(fake.starts) == 1
    slots = [(slot, tokens) for _, slot, tokens in fake.asked]
    start = [(0, SHORT), (1, SHORT)]
    assert slots[:4] == [*start, (0, SHORT), (0, [ord("k")])]
    assert slots[4:6] == start
    assert sorted(slots[6:]) == [(0, [ord("a")]), (1, [ord("m")])]


def test_variables_that_are_options_of_the_server_are_not_passed_on(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake ends where it finds one."""
    monkeypatch.setenv("LLAMA_ARG_SPEC_TYPE", "ngram-simple")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    engine = open_engine()
    assert engine.answer(PLAIN, {}, [TEXT], 1)
    (note,) = [n for n in engine.launch(PLAIN, {}).notes if "variables" in n]
    assert "LLAMA_API_KEY, LLAMA_ARG_SPEC_TYPE" in note
    assert "secret" not in note


def test_a_model_that_predicts_ahead_takes_no_other_draft_model(
    open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = write_gguf(tmp_path / "draft.gguf", seed=1)
    ahead = write_gguf(tmp_path / "ahead.gguf", nextn_predict_layers=1)
    monkeypatch.setattr(
        "adaptspec_plugins.engines.llama_cpp.engine.missing_options", lambda *_: []
    )
    engine = open_engine(model=str(ahead), draft_model=str(draft))
    assert "-md" not in engine.launch("draft_mtp", {}).command
    assert "-md" in engine.launch("draft_simple", {}).command


def test_room_follows_the_free_memory(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [0]
    name = "adaptspec_plugins.engines.llama_cpp.engine.usable_memory"
    monkeypatch.setattr(name, lambda: free[-1])
    engine = open_engine()
    assert engine.room == 1
    free.append(int(3.5 * (512 << 20) / 0.7))  # three servers of 512 MiB
    assert engine.room == 3
    free.append(1 << 50)
    assert 1 < engine.room < 20


def test_near_ties_are_within_the_types_rounding(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    """The fake's next tokens are half a nat apart; 4-bit weights round as much."""
    engine = open_engine()
    after, tokens = ord("c"), [ord("d")]
    assert engine.near_tie(TEXT, tokens, after + 2, after + 3) is True
    assert engine.near_tie(TEXT, tokens, after + 3, after + 4) is False
    assert engine.near_tie(TEXT, tokens, after + 2, 7) is False
    assert engine.near_tie(TEXT, [1] * 600, 2, 3) is None
    import gguf

    exact = write_gguf(tmp_path / "f.gguf", file_type=gguf.LlamaFileType.MOSTLY_BF16)
    finer = open_engine(model=str(exact))
    assert finer.near_tie(TEXT, tokens, after + 2, after + 3) is False
    assert finer.near_tie(TEXT, tokens, after + 2, after + 2) is True


def test_launch_is_what_was_measured(open_engine: OpenEngine, fake: Any) -> None:
    engine = open_engine(arguments=["--device", "none"])
    params = {"n_match": 5, "n_min": 9, "n_max": 7}
    engine.answer("ngram_mod", params, [TEXT], 1)
    launch = engine.launch("ngram_mod", params)
    ((_, words),) = fake.starts
    assert launch.command[0] == fake.command
    ours = words.index("--cache-ram")
    assert list(launch.command[1:]) == words[:ours]
    assert option(words, "--spec-ngram-mod-n-min") == "7"
    assert words[ours + 2 :: 2] == ["--host", "--port"]
    assert any("--cache-ram 0" in note for note in launch.notes)
    assert any("-np is how many" in note for note in launch.notes)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("ngram_mod", ["a prompt that comes again gains more"]),
        ("ngram_cache", ["hardly drafts from the request itself, and gains less"]),
        ("ngram_map_k4v", ["keeps positions of its last request and finds less"]),
        ("ngram_map_k4v_ngram_mod", ["finds less", "a prompt that comes again"]),
        ("ngram_simple", []),
    ],
)
def test_what_its_memory_makes_of_a_server_that_runs_on_is_told(
    method: str, says: list[str], open_engine: OpenEngine
) -> None:
    engine = open_engine()
    plain = engine.launch(PLAIN, {}).notes
    told = [note for note in engine.launch(method, {}).notes if note not in plain]
    assert len(told) == len(says)
    assert all(words in note for words, note in zip(says, told, strict=True))


def test_a_draft_model_opens_its_methods(
    open_engine: OpenEngine, fake: Any, tmp_path: Path
) -> None:
    draft = write_gguf(tmp_path / "draft.gguf", seed=1)
    engine = open_engine(draft_model=str(draft))
    assert [m.name for m in engine.methods] == [
        *(PLAIN, "ngram_simple", "ngram_map_k4v", "ngram_mod", "ngram_cache"),
        *("draft_simple", "ngram_map_k4v_ngram_mod", "ngram_simple_draft_simple"),
        *("ngram_map_k4v_draft_simple", "ngram_mod_draft_simple"),
    ]
    engine.answer("ngram_simple_draft_simple", {"draft_n_max": 5}, [TEXT], 1)
    ((_, words),) = fake.starts
    assert option(words, "-md") == str(draft)
    assert option(words, "--spec-type") == "ngram-simple,draft-simple"
    assert engine.environment.draft_name == "draft"
    assert engine.environment.draft != engine.environment.model


def test_why_a_method_is_not_there_is_told(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    eagle = write_gguf(tmp_path / "eagle.gguf", "eagle3")
    engine = open_engine(draft_model=str(eagle))
    told = engine.unavailable
    assert told["ngram_map_k"] == (
        "this llama-server (4321 (abcdef0)) lacks --spec-ngram-map-k-size-n"
    )
    assert "lacks --spec-type draft-eagle3" in told["draft_eagle3"]
    assert told["draft_simple"] == (
        "eagle.gguf is of architecture eagle3, which drafts as draft_eagle3"
    )
    assert "--draft-model" in open_engine().unavailable["draft_simple"]
    with pytest.raises(EngineError, match="ngram_map_k isn't available: this llama"):
        engine.answer("ngram_map_k", {}, [TEXT], 1)


def test_a_server_that_gave_up_speculation_is_no_measurement(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_NO_DRAFT", "1")
    engine = open_engine()
    assert engine.answer(PLAIN, {}, [TEXT], 1)
    with pytest.raises(EngineError, match=r"without speculation.*vocabs are not comp"):
        engine.answer("ngram_cache", {}, [TEXT], 1)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CANT_LOAD", "out of memory", "exit code 1; .* error: out of memory"),
        ("REFUSE", "bad\nprompt", "refused /completion with 400: bad prompt"),
        ("DIE", "SIGKILL", "killed, perhaps for want of memory; .*last thing it says"),
        ("DIE", "SIGSEGV", "ended by SIGSEGV; .*last thing it says"),
    ],
)
def test_errors_are_one_line_with_the_logs_end(
    variable: str,
    value: str,
    says: str,
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = open_engine()
    with monkeypatch.context() as patched:
        patched.setenv(f"FAKE_LLAMA_{variable}", value)
        with pytest.raises(EngineError, match=says) as caught:
            engine.answer(PLAIN, {}, [TEXT], 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("together", [1, 2])
def test_a_server_that_gives_no_answer_is_ended(
    together: int, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_STUCK", "1")
    command = [fake.command, "-m", "model.gguf", "-np", str(together), "--port"]
    process = start_server("llama-server", lambda port: [*command, str(port)])
    server = LlamaServer(process, token_seconds=0.1)
    monkeypatch.setattr(f"{LlamaServer.__module__}.ANSWER_SECONDS", 0.2)
    with pytest.raises(
        EngineError, match=r"within \d\S* s .* each of [48] tokens.*looks for an answer"
    ) as caught:
        server.answer([([97], 3)] * together, forget=False)
    assert "\n" not in str(caught.value)
    assert process.ended == "it was stopped"


def test_an_unknown_option_is_named(open_engine: OpenEngine) -> None:
    with pytest.raises(EngineError, match="invalid argument: --colour"):
        open_engine(arguments=["--colour", "red"]).answer(PLAIN, {}, [TEXT], 1)


def test_a_server_that_was_killed_is_started_again(
    open_engine: OpenEngine, fake: Any
) -> None:
    engine = open_engine()
    engine.answer(PLAIN, {}, [TEXT], 1)
    os.kill(fake.starts[0][0], signal.SIGKILL)
    engine._servers[next(iter(engine._servers))].process._watcher.wait(30)
    assert engine.answer(PLAIN, {}, [TEXT], 1)[0].text == "d"
    assert len(fake.starts) == 2


def test_a_context_is_spoken_of_where_one_is_told(open_engine: OpenEngine) -> None:
    for context, told in ((300, True), (None, False)):
        launch = open_engine(context=context).launch(PLAIN, {})
        assert ("-c" in launch.command) == told
        assert any("-c is the context" in note for note in launch.notes) == told


def test_environments_differ_by_what_decides_speed(
    open_engine: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = open_engine(threads=2).environment
    assert (one.engine, one.dtype, one.device) == ("llama.cpp", "Q4_K_M", "cpu")
    assert one.versions["llama.cpp"] == "4321 (abcdef0)"
    assert (one.threads, one.concurrency, one.model_name) == (2, 1, "model")
    assert one.key() == open_engine(threads=2, context=99).environment.key()
    others: list[dict[str, Any]] = [
        {"threads": 1},
        {"threads": 2, "concurrency": 4},
        {"threads": 2, "arguments": ["-fa", "off"]},
        {"threads": 2, "model": str(write_gguf(tmp_path / "b.gguf", seed=2))},
    ]
    for options in others:
        assert open_engine(**options).environment.key() != one.key()
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", "BLAS: OpenBLAS (0 MiB, 0 MiB free)")
    assert open_engine(threads=2).environment.key() == one.key()
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", "CUDA0: NVIDIA H200 (1 MiB, 1 MiB free)")
    engine = open_engine()
    assert engine.environment.device == "cuda"
    assert engine.environment.device_name == "NVIDIA H200"
    assert engine.room == 1
    on_cpu: list[dict[str, Any]] = [{"device": "cpu"}, {"arguments": ["-ngl", "0"]}]
    for options in on_cpu:
        assert open_engine(**options).environment.device == "cpu"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": None}, "needs a model: --model"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' can't be told"),
        ({"heads": ["medusa"]}, "takes trained heads .* as a GGUF file"),
        ({"python": "python"}, "without Python"),
        ({"api_key": "x"}, "wants no key"),
        ({"concurrency": 0}, "concurrency >= 1 must hold, got 0"),
        ({"arguments": ["--port", "1"]}, "--port can't be one .*: a free one is taken"),
        ({"arguments": ["-np", "2"]}, "-np can't be one .*: --concurrency"),
        ({"arguments": ["--spec-type", "x"]}, "--spec-type can't be one"),
        ({"arguments": ["--spec_type", "x"]}, "--spec-type can't be one"),
        ({"arguments": ["--draft-p-min", "1"]}, "--draft-p-min .*the tune tries it"),
        ({"arguments": ["--spec-draft-n-max", "1"]}, "n-max .*the tune tries it"),
        ({"arguments": ["--spec_synth-len", "3"]}, "--spec-synth-len .*be made up"),
        ({"arguments": ["-hfd", "a/b"]}, "-hfd can't be .*a file: --draft-model"),
        ({"arguments": ["--api-key", "x"]}, "--api-key can't be .*wants no key"),
        ({"arguments": ["--no-slots"]}, "--no-slots can't be"),
        ({"arguments": ["--cache-reuse", "1"]}, "--cache-reuse .*earlier one's memory"),
        ({"arguments": ["--fim-qwen-7b-spec"]}, "a model is a file: --model"),
        ({"command": "no-such-server"}, "no program 'no-such-server'"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    told = {"model": str(tmp_path / "m.gguf"), **options}
    with pytest.raises(EngineError, match=says):
        LlamaCpp.open(EngineOptions(**told))


def test_what_no_setting_says_is_passed_on(open_engine: OpenEngine) -> None:
    words = ["-td", "1", "-ctk", "q8_0"]
    words += ["--spec-draft-threads", "1", "--spec-draft-type-k", "q8_0", "-5"]
    words += ["--spec-draft-sampling", "greedy", "--no-spec-draft-backend-sampling"]
    words += ["--spec-draft-p-split", "0.2", "--draft-p-split", "0.2"]
    launch = open_engine(arguments=words).launch(PLAIN, {})
    assert list(launch.command[-len(words) :]) == words
