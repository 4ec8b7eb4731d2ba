"""SGLang's flags: translated, labelled, and refused where it has no such method."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.engines.exporting.measured import Setting
from adaptspec.engines.exporting.sglang import launch, untranslatable
from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.errors import EngineError
from adaptspec.host import Host
from adaptspec.params import Scalar
from adaptspec.profile import PLAIN, ProfileStore
from adaptspec_profiles import open_store
from measured_engines import DAY, HERE, keep_run

OPTIONS = EngineOptions(
    model="org/target", draft_model="org/draft", heads=("org/x-EAGLE3", "org/x-eagle")
)
START = ["python3", "-m", "sglang.launch_server", "--model-path", "org/target"]
# Arguments of SGLang's server that are told something here (its documentation's table).
KNOWN = {
    "--model-path",
    "--dtype",
    "--context-length",
    "--trust-remote-code",
    "--speculative-algorithm",
    "--speculative-draft-model-path",
    "--speculative-num-steps",
    "--speculative-eagle-topk",
    "--speculative-num-draft-tokens",
    "--speculative-ngram-max-bfs-breadth",
    "--speculative-ngram-max-trie-depth",
}


def flags(
    engine: str, method: str, params: Mapping[str, Scalar]
) -> tuple[dict[str, str], str]:
    """Speculative flags and notes."""
    found = launch(engine, Setting.of(method, params), OPTIONS)
    assert list(found.command[: len(START)]) == START
    rest = list(found.command[len(START) :])
    told = dict(zip(rest[::2], rest[1::2], strict=True))
    assert set(told) <= KNOWN
    return told, " ".join(found.notes)


CHAIN = {"--speculative-eagle-topk": "1"}


@pytest.mark.parametrize(
    ("engine", "method", "params", "algorithm", "model"),
    [
        ("vllm", "draft_model", {"num_speculative_tokens": 4}, "STANDALONE", "draft"),
        ("vllm", "eagle", {"num_speculative_tokens": 4}, "EAGLE", "x-eagle"),
        ("vllm", "eagle3", {"num_speculative_tokens": 4}, "EAGLE3", "x-EAGLE3"),
        ("vllm", "mtp", {"num_speculative_tokens": 4}, "EAGLE", None),
        ("llama.cpp", "draft_simple", {"draft_n_max": 4}, "STANDALONE", "draft"),
        ("llama.cpp", "draft_eagle3", {"draft_n_max": 4}, "EAGLE3", "draft"),
        ("llama.cpp", "draft_mtp", {"draft_n_max": 4}, "EAGLE", None),
    ],
)
def test_a_chain_of_so_many_tokens_stays_one(
    engine: str,
    method: str,
    params: Mapping[str, Scalar],
    algorithm: str,
    model: str | None,
) -> None:
    told, notes = flags(engine, method, params)
    path = {} if model is None else {"--speculative-draft-model-path": f"org/{model}"}
    assert told == {
        "--speculative-algorithm": algorithm,
        "--speculative-num-steps": "4",
        "--speculative-num-draft-tokens": "5",
        **CHAIN,
        **path,
    }
    assert "not measured on SGLang" in notes


@pytest.mark.parametrize(
    ("engine", "method", "params", "depth"),
    [
        ("vllm", "ngram", {"num_speculative_tokens": 8, "prompt_lookup_max": 4}, None),
        ("vllm", "ngram", {"num_speculative_tokens": 16, "prompt_lookup_max": 4}, "20"),
        (
            *("vllm", "ngram_gpu"),
            {"num_speculative_tokens": 8, "prompt_lookup_max": 4},
            None,
        ),
        ("llama.cpp", "ngram_simple", {"size_m": 8, "size_n": 3}, None),
        ("llama.cpp", "ngram_map_k", {"size_m": 48, "size_n": 12}, "60"),
        ("llama.cpp", "ngram_mod", {"n_max": 64, "n_match": 24, "n_min": 0}, "88"),
    ],
)
def test_an_ngram_lookup_is_a_chain_that_fits_the_cache(
    engine: str, method: str, params: Mapping[str, Scalar], depth: str | None
) -> None:
    told, notes = flags(engine, method, params)
    assert "By its documentation NGRAM runs on CUDA alone." in notes
    drafted = next(iter(params.values()))
    deep = {} if depth is None else {"--speculative-ngram-max-trie-depth": depth}
    assert told == {
        "--speculative-algorithm": "NGRAM",
        "--speculative-num-draft-tokens": str(int(drafted) + 1),
        "--speculative-ngram-max-bfs-breadth": "1",
        **deep,
    }


def test_as_many_tokens_are_drafted_as_llama_cpp_was_told() -> None:
    """It is started with a size_m of size_n at least."""
    told, _ = flags("llama.cpp", "ngram_simple", {"size_n": 20, "size_m": 4})
    assert told["--speculative-num-draft-tokens"] == "21"
    assert told["--speculative-ngram-max-trie-depth"] == "40"
    told, _ = flags("llama.cpp", "ngram_map_k", {"size_n": 20, "size_m": 4})
    assert told["--speculative-num-draft-tokens"] == "5"


def test_arguments_of_another_engine_are_said_to_be_left_out() -> None:
    options = replace(OPTIONS, arguments=("--tensor-parallel-size", "2"))
    notes = launch("vllm", Setting.of(PLAIN, {}), options).notes
    told = "Arguments of vllm aren't translated (--tensor-parallel-size 2)"
    assert any(note.startswith(told) for note in notes)


def test_a_context_that_is_no_longer_than_was_measured_is_said() -> None:
    found = launch("vllm", Setting.of(PLAIN, {}), replace(OPTIONS, context=300))
    assert list(found.command[-2:]) == ["--context-length", "300"]
    assert "--context-length is the longest prompt" in " ".join(found.notes)
    assert "--context-length" not in flags("vllm", PLAIN, {})[1]


def test_what_sglang_has_nothing_like_is_said() -> None:
    _, notes = flags(
        "llama.cpp", "draft_simple", {"draft_n_max": 4, "draft_p_min": 0.5}
    )
    assert "nothing like draft_p_min=0.5" in notes
    assert flags("vllm", PLAIN, {})[0] == {}


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    params = {"num_speculative_tokens": 4, "use_heterogeneous_vocab": True}
    with pytest.raises(EngineError, match="no draft models of another vocabulary"):
        launch("vllm", Setting.of("draft_model", params), OPTIONS)


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("vllm", "suffix"),
        ("vllm", "medusa"),
        ("llama.cpp", "ngram_cache"),
        ("llama.cpp", "ngram_simple_draft_simple"),
        ("llama.cpp", "draft_dflash"),
    ],
)
def test_a_method_that_sglang_lacks_is_refused(engine: str, method: str) -> None:
    setting = Setting.of(method, {})
    assert f"no method like {engine}'s {method}" in (
        untranslatable(engine, setting) or ""
    )
    with pytest.raises(EngineError, match="no method like"):
        launch(engine, setting, OPTIONS)


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("draft_simple", EngineOptions(model="t.gguf"), "--model"),
        ("draft_simple", EngineOptions(), "--model"),
        ("draft_simple", EngineOptions(model="t"), "--draft-model"),
        (
            "draft_simple",
            EngineOptions(model="t", draft_model="d.gguf"),
            "--draft-model",
        ),
    ],
)
def test_models_that_sglang_cannot_load_are_asked_for(
    method: str, options: EngineOptions, told: str
) -> None:
    with pytest.raises(EngineError, match=f"pass {told}"):
        launch("llama.cpp", Setting.of(method, {"draft_n_max": 4}), options)
    with pytest.raises(EngineError, match="--heads FOLDER"):
        launch(
            "vllm",
            Setting.of("eagle", {"num_speculative_tokens": 2}),
            EngineOptions(model="t"),
        )


@pytest.fixture
def db(tmp_path: Path) -> str:
    return str(tmp_path / "profiles.db")


@pytest.fixture
def store(db: str) -> Iterator[ProfileStore]:
    store = open_store(db)
    yield store
    store.close()


def export(db: str, *arguments: str) -> str:
    host = Host({"profiles": adaptspec_profiles.plugin})
    words = ["export", "--for", "sglang", "--db", db, *arguments]
    return CliRunner().invoke(build_cli(host), words).output


NGRAM, SUFFIX = ("ngram", 5), ("suffix", 16)
TOKENS = "num_speculative_tokens"


def test_vllms_profile_is_translated_and_labelled(db: str, store: ProfileStore) -> None:
    vllm = replace(HERE, engine="vllm", model_name="target")
    keep_run(
        store,
        {"a": (1.0, {SUFFIX: 2.0, NGRAM: 1.5})},
        environment=vllm,
        length=TOKENS,
        model="models/target",
    )
    keep_run(store, {"a": (1.0, {("ngram_simple", 5): 3.0})}, run="r2", length="size_m")
    text = export(db)
    line = shlex.split(text.splitlines()[-1])
    assert line[:5] == [*START[:4], "models/target"]
    # vLLM's goes first, and of it what SGLang has something like.
    assert line[line.index("--speculative-algorithm") + 1] == "NGRAM"
    assert line[line.index("--speculative-num-draft-tokens") + 1] == "6"
    assert "not measured on SGLang" in text
    assert "measured on vllm, A CPU" in text
    found = json.loads(export(db, "--format", "json", "--model", "org/target"))
    assert found["measured"] is False
    assert found["measured_on"]["engine"] == "vllm"
    assert found["servers"][0]["command"][4] == "org/target"


def test_what_is_translated_was_measured_with_as_many_requests(
    db: str, store: ProfileStore
) -> None:
    vllm = replace(HERE, engine="vllm", model_name="target")
    for count, tokens in ((4, 5), (1, 7)):
        keep_run(
            store,
            {"a": (1.0, {("ngram", tokens): 1.5})},
            run=f"r{count}",
            environment=replace(vllm, concurrency=count),
            length=TOKENS,
            created=DAY - timedelta(days=count),
            model="models/target",
            concurrency=count,
        )
    assert "measured with 1, 4 requests at a time; say how many" in export(db)
    for count, drafted in ((1, "8"), (4, "6")):
        text = export(db, "--concurrency", str(count))
        assert f"--speculative-num-draft-tokens {drafted}" in text
    assert "which are 1, 4, got 8" in export(db, "--concurrency", "8")


@pytest.mark.parametrize(
    ("engine", "given", "name"),
    [
        ("vllm", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("vllm", "link", "real"),
        ("llama.cpp", "m-00001-of-00002.gguf", "m"),
    ],
)
def test_a_model_is_known_by_what_the_tune_was_given(
    db: str,
    store: ProfileStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    given: str,
    name: str,
) -> None:
    """Whatever it is called in profiles."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    settings = {NGRAM: 1.5} if engine == "vllm" else {("ngram_simple", 5): 1.5}
    keep_run(
        store,
        {"a": (1.0, settings)},
        environment=replace(HERE, engine=engine, model_name=name),
        length=TOKENS if engine == "vllm" else "size_m",
        model=given,
    )
    for arguments in ([], ["--model", given]):
        text = export(db, *arguments)
        if engine == "vllm":
            (line,) = (x for x in text.splitlines() if x and not x.startswith("#"))
            model = str(tmp_path / "link") if given == "link" else given
            assert shlex.split(line)[4] == model
        else:
            assert f"{given} is llama.cpp's; pass --model" in text
    assert "--speculative-algorithm NGRAM" in export(db, "--model", f"org/{name}")


def test_a_tune_of_the_default_model_is_translated_for_it(
    db: str, store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "adaptspec.default_model.default_model_path", lambda: Path("/cache/default")
    )
    vllm = replace(HERE, engine="vllm", model_name="default")
    kept: dict[str, Any] = {"environment": vllm, "length": TOKENS, "model": None}
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})}, **kept)
    assert "--model-path /cache/default" in export(db)


def test_folders_of_one_name_are_told_apart(db: str, store: ProfileStore) -> None:
    for days, (folder, tokens) in enumerate((("/a", 4), ("/b", 7))):
        keep_run(
            store,
            {"a": (1.0, {("ngram", tokens): 1.5})},
            run=f"r{days}",
            environment=replace(
                HERE, engine="vllm", model=f"m{days}", model_name="model"
            ),
            length=TOKENS,
            created=DAY + timedelta(days=days),
            model=f"{folder}/model",
        )
    for folder, drafted in (("/a", "5"), ("/b", "8")):
        text = export(db, "--model", f"{folder}/model")
        assert f"--speculative-num-draft-tokens {drafted}" in text
    told = export(db, "--model", "/c/model")
    assert "2 models called model were measured; name the run" in told


def test_what_the_first_engine_lacks_is_told(db: str, store: ProfileStore) -> None:
    """Not that the second one wasn't measured."""
    vllm = replace(HERE, engine="vllm")
    kept: dict[str, Any] = {"environment": vllm, "length": TOKENS, "model": "/m/x"}
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})}, **kept)
    told = export(db, "--model", "org/other")
    assert "no tune of vllm or llama.cpp measured org/other; name the run" in told
    assert "carry over" not in told


@pytest.mark.slow
def test_llama_cpps_profile_needs_models_that_sglang_loads(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {"a": (1.0, {("ngram_simple", 5): 3.0})}, length="size_m")
    assert "target.gguf is llama.cpp's; pass --model" in export(db)
    assert "no tune of vllm or llama.cpp measured org/other" in export(
        db, "--model", "org/other"
    )
    text = export(db, "--model", "org/other", "--run", "r1")
    assert "--speculative-algorithm NGRAM --speculative-num-draft-tokens 6" in text
    assert "NGRAM" in export(db, "--model", "org/target")  # by its name


@pytest.mark.slow
def test_without_any_profile_the_commands_that_measure_are_told(db: str) -> None:
    told = export(db)
    assert told.startswith("Error: SGLang isn't measured")
    assert "adaptspec tune --engine" in told
    assert told.count("\n") == 1
