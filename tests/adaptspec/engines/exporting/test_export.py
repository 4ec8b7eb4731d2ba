"""``adaptspec export --for``: what is printed of what was measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import adaptspec_profiles.plugin
from adaptspec.cli import build_cli
from adaptspec.engines.inference_engine import InferenceEngine
from adaptspec.errors import EngineError
from adaptspec.host import Host
from adaptspec.profile import EVERY_CLASS, OURS, ProfileStore
from adaptspec.router.table import read_table
from adaptspec_profiles import open_store
from classifiers import by_hand
from measured_engines import DAY, HERE, FakeEngine, FakeEngines, keep_run

NGRAM, MOD, DRAFT = ("ngram_simple", 6), ("ngram_mod", 8), ("draft_simple", 3)
TWO = {
    "code": (4.0, {NGRAM: 1.2, DRAFT: 1.9}),
    "sums": (8.0, {NGRAM: 2.2, DRAFT: 1.1}),
    "chat": (2.0, {NGRAM: 1.0, DRAFT: 0.8}),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    FakeEngine.opened.clear()
    FakeEngine.closed = 0
    here = FakeEngine.here
    yield
    FakeEngine.here = here


@pytest.fixture
def db(tmp_path: Path) -> str:
    return str(tmp_path / "profiles.db")


@pytest.fixture
def store(db: str) -> Iterator[ProfileStore]:
    store = open_store(db)
    yield store
    store.close()


def export(db: str, *arguments: str) -> Result:
    host = Host({"profiles": adaptspec_profiles.plugin, "fake": FakeEngines()})
    words = ["export", *arguments, "--db", db]
    return CliRunner().invoke(build_cli(host), words)


def printed(db: str, *arguments: str) -> str:
    done = export(db, "--for", "llama.cpp", *arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def told(db: str, *arguments: str) -> Any:
    return json.loads(printed(db, "--format", "json", *arguments))


def refused(db: str, *arguments: str) -> str:
    done = export(db, *arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def commands(text: str) -> list[list[str]]:
    """What a shell would run: comments and empty lines say nothing to it."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [shlex.split(line) for line in lines]


def test_the_command_is_one_line_with_the_engines_flags(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {"code": (1.0, {NGRAM: 1.8})}, model="/m/a b.gguf")
    (words,) = commands(printed(db))
    assert words == [
        *("OMP_NUM_THREADS=2", "llama-server", "-m", "/m/a b.gguf"),
        *("--spec-type", "ngram_simple", "--draft_length=6"),
        *("--host", "127.0.0.1", "--port", "8000"),
    ]
    assert FakeEngine.closed == 1


def test_comments_say_what_was_measured_where_and_what_the_engine_cannot_do(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, TWO, draft_model="d.gguf", environment=replace(HERE, draft="d1"))
    text = printed(db)
    assert "A CPU, 2 threads, 1 request at a time" in text
    assert "llama.cpp 1234" in text
    assert "run r1" in text
    assert "# It can't choose by class." in text
    assert "# sums: 2.20x plain decoding in time per answer" in text
    assert "(95%: 1.98 to 2.42, 10 prompts)" in text
    loss = 1 - 1.2 / 1.9
    lost = f"it loses {loss:.0%} of the 1.90x that draft_simple (draft_length=3)"
    assert lost in text


def test_one_setting_for_all_is_the_one_that_takes_the_least_time(
    db: str, store: ProfileStore
) -> None:
    environment = replace(HERE, draft="d1", draft_name="draft")
    keep_run(store, TWO, draft_model="d.gguf", environment=environment)
    found = told(db)
    plain = 4 + 8 + 2
    assert found["expected_ratio"] == pytest.approx(plain / (4 / 1.2 + 8 / 2.2 + 2))
    (server,) = found["servers"]
    assert (server["method"], server["params"]) == ("ngram_simple", {"draft_length": 6})
    assert server["classes"]["code"]["best"]["method"] == "draft_simple"
    assert server["classes"]["code"]["loss"] == pytest.approx(1 - 1.2 / 1.9)
    assert server["classes"]["sums"]["loss"] == 0
    # Of much code the draft model is better.
    found = told(db, "--mix", "code=20", "--mix", "sums=1")
    assert found["servers"][0]["method"] == "draft_simple"
    shares = {n: g["share"] for n, g in found["servers"][0]["classes"].items()}
    assert shares == pytest.approx({"code": 20 / 21, "sums": 1 / 21, "chat": 0})


@pytest.mark.slow
def test_a_class_alone_gets_its_own(db: str, store: ProfileStore) -> None:
    environment = replace(HERE, draft="d1")
    keep_run(store, TWO, draft_model="d.gguf", environment=environment)
    for name, method in (
        ("code", "draft_simple"),
        ("sums", "ngram_simple"),
        ("chat", "autoregressive"),
    ):
        (server,) = told(db, "--class", name)["servers"]
        assert server["method"] == method
        assert list(server["classes"]) == [name]
    message = refused(db, "--for", "llama.cpp", "--class", "poems")
    assert "no class 'poems' was measured; were: chat, code, sums" in message


@pytest.mark.slow
def test_split_gives_each_setting_a_server_and_writes_the_routers_table(
    db: str, store: ProfileStore, tmp_path: Path
) -> None:
    measured = {**TWO, "more code": (1.0, {NGRAM: 1.1, DRAFT: 1.7})}
    environment = replace(HERE, draft="d1")
    keep_run(store, measured, draft_model="d.gguf", environment=environment)
    store.put_record("r1", "classifier", by_hand().as_json())
    for name in ("table.json", "table.yaml"):
        path = tmp_path / name
        text = printed(db, "--split", "--table", str(path))
        ports = [words[-2] for words in commands(text)]
        assert ports == ["8001", "8002", "8003"]
        assert all(words[-1] == "&" for words in commands(text))
        table = read_table(path)
        assert table.classes == {
            "chat": "plain",
            "code": "draft_simple",
            "more code": "draft_simple",
            "sums": "ngram_simple",
        }
        assert table.servers == {
            "plain": ["http://127.0.0.1:8001"],
            "draft_simple": ["http://127.0.0.1:8002"],
            "ngram_simple": ["http://127.0.0.1:8003"],
        }
        assert table.default == "ngram_simple"  # the least time over all of them
        assert table.teller is not None
    found = told(db, "--split", "--port", "9000", "--host", "0.0.0.0")
    assert found["table"]["servers"]["plain"] == "http://127.0.0.1:9000"
    assert found["table"]["classifier"]["names"] == ["short", "long"]
    assert found["servers"][0]["command"][-4:] == [
        "--host",
        "0.0.0.0",
        "--port",
        "9000",
    ]
    plain = 4 + 8 + 2 + 1
    took = 4 / 1.9 + 8 / 2.2 + 2 + 1 / 1.7
    assert found["expected_ratio"] == pytest.approx(plain / took)


def test_two_settings_of_a_method_have_names_of_their_own(
    db: str, store: ProfileStore
) -> None:
    longer = ("ngram_simple", 20)
    keep_run(
        store,
        {"a": (1.0, {NGRAM: 1.5, longer: 1.2}), "b": (1.0, {NGRAM: 1.2, longer: 3.0})},
    )
    found = told(db, "--split")
    assert [s["name"] for s in found["servers"]] == ["ngram_simple", "ngram_simple-2"]
    assert any("share it when both are busy" in note for note in found["notes"])


def test_where_no_setting_is_known_on_all_classes_plain_decoding_is_added(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {"a": (1.0, {NGRAM: 1.5}), "b": (1.0, {MOD: 1.5})})
    found = told(db, "--split")
    assert [s["name"] for s in found["servers"]] == [
        "ngram_simple",
        "ngram_mod",
        "plain",
    ]
    assert found["table"]["default"] == "plain"
    # And one for all is then plain decoding, which says what it left out.
    found = told(db)
    assert found["servers"][0]["method"] == "autoregressive"
    assert len([note for note in found["notes"] if "left out" in note]) == 2


def test_prompts_of_no_class_are_never_slower_for_the_split(
    db: str, store: ProfileStore
) -> None:
    keep_run(
        store,
        {"a": (1.0, {NGRAM: 1.5, MOD: 0.2}), "b": (1.0, {NGRAM: 0.2, MOD: 1.5})},
    )
    found = told(db, "--split")
    assert [s["name"] for s in found["servers"]][2:] == ["plain"]
    assert found["table"]["default"] == "plain"
    assert found["table"]["classes"] == {"a": "ngram_simple", "b": "ngram_mod"}


def test_all_servers_of_a_split_have_a_port(db: str, store: ProfileStore) -> None:
    keep_run(store, {"a": (1.0, {NGRAM: 1.5}), "b": (1.0, {})})
    told(db, "--split", "--port", "65534")
    message = refused(db, "--for", "llama.cpp", "--split", "--port", "65535")
    assert "2 servers" in message
    assert "give 65534 or less" in message


def test_options_are_those_of_the_tune_unless_given_anew(
    db: str, store: ProfileStore
) -> None:
    record: dict[str, Any] = {
        "model": "a.gguf",
        "draft_model": "d.gguf",
        "engine_command": "/opt/llama-server",
        "engine_python": "python9",
        "engine_argument": ["-fa", "on"],
        "threads": 2,
        "batch_threads": 3,
        "dtype": "auto",
        "context": 2048,
        "trust_remote_code": True,
    }
    keep_run(store, TWO, environment=replace(HERE, draft="d1"), **record)
    printed(db)
    options = FakeEngine.opened[-1]
    assert (options.model, options.draft_model) == ("a.gguf", "d.gguf")
    assert (options.command, options.python) == ("/opt/llama-server", "python9")
    assert list(options.arguments) == ["-fa", "on"]
    assert (options.threads, options.batch_threads) == (2, 3)
    assert options.context == 2048
    assert (options.concurrency, options.trust_remote_code) == (1, True)
    assert not options.runs_here  # the flags may be for another machine
    printed(db, "--engine-command", "other", "--draft-model", "e.gguf")
    options = FakeEngine.opened[-1]
    assert (options.command, options.draft_model) == ("other", "e.gguf")
    assert options.model == "a.gguf"
    assert options.python is None  # it named another installation
    printed(db, "--engine-python", "python8")
    options = FakeEngine.opened[-1]
    assert (options.command, options.python) == (None, "python8")


def test_flags_are_those_of_the_run_whose_setting_is_printed(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {"a": (1.0, {NGRAM: 1.8})}, batch_threads=3, context=300)
    keep_run(
        store,
        {"a": (1.0, {NGRAM: 1.5})},
        run="r2",
        prompts={"a": 2},
        created=DAY + timedelta(days=1),
        batch_threads=7,
        context=4000,
    )
    assert "run r1" in printed(db)
    options = FakeEngine.opened[-1]
    assert (options.batch_threads, options.context) == (3, 300)
    assert len(FakeEngine.opened) == FakeEngine.closed == 2
    printed(db, "--run", "r2")
    options = FakeEngine.opened[-1]
    assert (options.batch_threads, options.context) == (7, 4000)


def test_of_runs_that_decided_a_class_each_it_is_told_which_ran_otherwise(
    db: str, store: ProfileStore
) -> None:
    decided = {"a": (1.0, {NGRAM: 1.8}), "b": (1.0, {NGRAM: 1.8})}
    keep_run(store, decided, threads=2, batch_threads=3, context=4000)
    keep_run(store, {"c": (1.0, {NGRAM: 1.5})}, run="r2", threads=2, context=300)
    text = printed(db)
    options = FakeEngine.opened[-1]
    assert (options.threads, options.batch_threads) == (2, 3)
    assert options.context == 4000  # the longest
    told = "c: measured in run r2 with --batch-threads 2, unlike these flags; --run r2"
    assert told in text
    text = printed(db, "--class", "c")
    assert (FakeEngine.opened[-1].batch_threads, "unlike" in text) == (None, False)


@pytest.mark.slow
def test_a_model_is_that_of_the_tune_however_its_path_is_written(
    db: str, store: ProfileStore, tmp_path: Path
) -> None:
    keep_run(store, TWO, run="r1", model=str(tmp_path / "a.gguf"), context=111)
    other = replace(HERE, model="m2", model_name="other")
    keep_run(store, TWO, run="r2", model="b.gguf", context=222, environment=other)
    message = refused(db, "--for", "llama.cpp")
    assert "2 models were measured" in message
    assert "--model MODEL" in message
    printed(db, "--model", str(tmp_path / "x" / ".." / "a.gguf"))
    assert FakeEngine.opened[-1].context == 111
    # One that no tune was given is looked for by what is in it.
    printed(db, "--model", "moved.gguf")
    options = FakeEngine.opened[-1]
    assert (options.model, options.context) == ("moved.gguf", 111)
    FakeEngine.here = replace(HERE, model="m3", model_name="third")
    assert "tune" in refused(db, "--for", "llama.cpp", "--model", "c.gguf")


def test_of_several_numbers_of_requests_one_must_be_said(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})}, run="r1")
    busy = replace(HERE, concurrency=4)
    keep_run(
        store, {"a": (1.0, {NGRAM: 0.5})}, run="r4", environment=busy, concurrency=4
    )
    message = refused(db, "--for", "llama.cpp")
    assert "measured with 1, 4 requests at a time" in message
    assert "--concurrency N" in message
    assert told(db, "--concurrency", "1")["servers"][0]["method"] == "ngram_simple"
    assert told(db, "--concurrency", "4")["servers"][0]["method"] == "autoregressive"
    message = refused(db, "--for", "llama.cpp", "--concurrency", "16")
    assert "that was measured, which are 1, 4, got 16; give one of them" in message
    assert "tune with --concurrency 16" in message


def test_profiles_of_our_own_engine_do_not_carry_over(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, TWO, environment=replace(HERE, engine=OURS))
    message = refused(db, "--for", "llama.cpp")
    assert "what was measured of our own decoding doesn't carry over" in message
    assert "adaptspec tune --engine llama.cpp --model MODEL" in message


def test_an_engine_that_is_no_server_is_refused(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "launch", InferenceEngine.launch)
    message = refused(db, "--for", "llama.cpp")
    assert "isn't started with flags" in message
    assert "adaptspec export DIR" in message


def test_without_any_profile_the_command_that_measures_is_told(db: str) -> None:
    message = refused(db, "--for", "llama.cpp")
    assert "nothing was measured of it yet" in message
    assert "adaptspec tune --engine llama.cpp" in message
    assert "there are: llama.cpp, sglang" in refused(db, "--for", "triton")


def test_what_was_measured_on_another_machine_serves_and_is_told(
    db: str, store: ProfileStore
) -> None:
    there = replace(HERE, device_name="A big server", threads=64)
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})}, environment=there)
    text = printed(db)
    assert "Measured on another machine: A big server (here A CPU)." in text
    assert "A big server, 64 threads" in text
    assert "ngram_simple" in text


def test_a_setting_whose_draft_model_is_not_here_is_passed_over_and_told(
    db: str, store: ProfileStore
) -> None:
    environment = replace(HERE, draft="d1", draft_name="draft")
    measured = {"a": (1.0, {DRAFT: 2.0, NGRAM: 1.5}), "b": (1.0, {NGRAM: 1.5})}
    keep_run(store, measured, environment=environment)
    found = told(db)
    assert found["servers"][0]["method"] == "ngram_simple"
    (note,) = (note for note in found["notes"] if "isn't here" in note)
    assert note.startswith("a: draft_simple was 2.00x with the draft model draft (")
    assert told(db, "--class", "b")["notes"] == []
    found = told(db, "--draft-model", "d.gguf", "--class", "a")
    assert found["servers"][0]["method"] == "draft_simple"
    assert found["notes"] == []


def test_what_was_measured_with_another_version_is_told(
    db: str, store: ProfileStore
) -> None:
    """A gain that was small is no longer sure, and then plain decoding says why."""
    keep_run(store, {"a": (1.0, {NGRAM: 1.2}), "b": (1.0, {NGRAM: 1.5})})
    versions = {**HERE.versions, "llama.cpp": "9999"}
    FakeEngine.here = replace(HERE, versions=versions)
    text = printed(db, "--split")
    assert text.count("the profile is stale (llama.cpp 1234 then, 9999 now)") == 1
    assert "# a: ngram_simple was measured with other versions" in text
    assert [words[-2] for words in commands(text)] == ["8001", "8002"]


def test_what_was_measured_with_other_threads_is_told(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})})
    FakeEngine.here = replace(HERE, threads=8)
    assert "# measured with threads 2 (here 8)" in printed(db)


def test_an_engine_that_can_starts_with_the_threads_that_were_measured(
    db: str, store: ProfileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(self: FakeEngine, threads: int, batch_threads: int) -> None:
        if threads > 8:
            raise EngineError("threads must be 1..8")
        FakeEngine.here = replace(HERE, threads=threads)

    monkeypatch.setattr(FakeEngine, "use_threads", use)
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})})
    FakeEngine.here = replace(HERE, threads=8)
    assert "measured with threads" not in printed(db)
    assert FakeEngine.here.threads == 2
    FakeEngine.here = replace(HERE, threads=8)
    many = replace(HERE, threads=64)
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})}, run="r2", environment=many)
    assert "# measured with threads 64 (here 8)" in printed(db, "--run", "r2")


def test_a_setting_that_this_version_does_not_know_is_passed_over(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {"a": (1.0, {("ngram_new", 4): 2.0, NGRAM: 1.5})})
    found = told(db)
    assert found["servers"][0]["method"] == "ngram_simple"
    assert "ngram_new is left out: llama.cpp has no method" in found["notes"][0]
    keep_run(store, {"a": (1.0, {NGRAM: 2.0})}, length="window")
    found = told(db)
    assert found["servers"][0]["method"] == "autoregressive"
    assert "ngram_simple is left out: " in found["notes"][0]


def test_a_workload_without_classes_has_one_command(
    db: str, store: ProfileStore
) -> None:
    keep_run(store, {EVERY_CLASS: (1.0, {NGRAM: 1.5})})
    for arguments in ([], ["--split"]):
        (server,) = told(db, *arguments)["servers"]
        assert server["method"] == "ngram_simple"


def test_a_split_of_one_setting_leaves_the_shell_free_as_well(
    db: str, store: ProfileStore
) -> None:
    """The router is started behind it."""
    keep_run(store, {"a": (1.0, {NGRAM: 1.5}), "b": (1.0, {NGRAM: 1.5})})
    ((*_, last),) = commands(printed(db, "--split"))
    assert last == "&"
    ((*_, last),) = commands(printed(db))
    assert last == "8000"


@pytest.mark.slow
def test_a_compose_file_has_a_service_for_each_server(
    db: str, store: ProfileStore, tmp_path: Path
) -> None:
    model = tmp_path / "mo$del.gguf"
    real = tmp_path / "blobs" / "1"
    real.parent.mkdir()
    real.write_text("weights")
    model.symlink_to(real)
    keep_run(store, TWO, model=str(model))
    text = printed(db, "--format", "compose", "--split")
    assert text.startswith("# llama.cpp: target")
    services = yaml.safe_load(text)["services"]
    assert list(services) == ["plain", "ngram_simple"]
    service = services["ngram_simple"]
    assert service["image"] == "ghcr.io/ggml-org/llama.cpp:server"
    assert service["entrypoint"] == ["/app/llama-server"]
    literal = str(model).replace("$", "$$")
    assert service["command"][:2] == ["-m", literal]
    assert service["command"][-4:] == ["--host", "0.0.0.0", "--port", "8002"]
    assert service["ports"] == ["127.0.0.1:8002:8002"]
    assert service["environment"] == {"OMP_NUM_THREADS": "2"}
    assert service["volumes"] == [f"{literal}:{literal}:ro", f"{real}:{real}:ro"]
    assert "deploy" not in service
    named = printed(db, "--format", "compose", "--image", "mine:1")
    assert yaml.safe_load(named)["services"]["ngram_simple"]["image"] == "mine:1"


def test_relative_paths_are_made_whole_wherever_they_stand(
    db: str,
    store: ProfileStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.gguf", "d.gguf", "heads", "llama-server"):
        (tmp_path / name).write_text("weights")
    told: dict[str, Any] = {
        "model": "./a.gguf",
        "draft_model": "d.gguf",
        "heads": ["heads", "org/x"],
        "engine_command": "./llama-server",
        "engine_python": "llama-server",
    }
    keep_run(store, TWO, environment=replace(HERE, draft="d1"), **told)
    text = printed(db, "--format", "compose")
    (service,) = yaml.safe_load(text)["services"].values()
    model, draft = tmp_path / "a.gguf", tmp_path / "d.gguf"
    assert service["command"][1] == str(model)
    assert f"{model}:{model}:ro" in service["volumes"]
    assert f"{draft}:{draft}:ro" in service["volumes"]
    options = FakeEngine.opened[-1]
    assert options.draft_model == str(draft)
    assert list(options.heads) == [str(tmp_path / "heads"), "org/x"]
    # A bare name is a program on the path of programs, whatever is in this folder.
    assert options.command == str(tmp_path / "llama-server")
    assert options.python == "llama-server"
    printed(db, "--model", "a.gguf", "--draft-model", "none.gguf")
    options = FakeEngine.opened[-1]
    assert (options.model, options.draft_model) == (str(model), "none.gguf")


def test_on_a_gpu_the_container_gets_it(db: str, store: ProfileStore) -> None:
    gpu = replace(HERE, device="cuda", device_name="A GPU")
    FakeEngine.here = gpu
    keep_run(store, {"a": (1.0, {NGRAM: 1.5})}, environment=gpu)
    text = printed(db, "--format", "compose")
    service = yaml.safe_load(text)["services"]["ngram_simple"]
    assert service["image"].endswith(":server-cuda")
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either DIR"),
        (["out", "--for", "vllm"], "give either DIR"),
        (["out", "--split"], "--split says nothing with DIR"),
        (["out", "--port", "1"], "--port says nothing with DIR"),
        (["--for", "llama.cpp", "--copy"], "--copy says nothing with --for"),
        (["--for", "llama.cpp", "--class", "a", "--split"], "leave one out"),
        (["--for", "llama.cpp", "--class", "a", "--mix", "a=1"], "leave one out"),
        (["--for", "llama.cpp", "--table", "t"], "--table is written with --split"),
        (["--for", "llama.cpp", "--image", "x"], "--image is for --format compose"),
        (["--for", "llama.cpp", "--mix", "code"], "CLASS=WEIGHT"),
        (["--for", "llama.cpp", "--mix", "code=-1"], "CLASS=WEIGHT"),
        (["--for", "llama.cpp", "--mix", "code=nan"], "CLASS=WEIGHT"),
        (["--for", "llama.cpp", "--run", "none"], "run 'none' decided nothing"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    db: str, store: ProfileStore, arguments: list[str], message: str
) -> None:
    keep_run(store, TWO)
    assert message in refused(db, *arguments)
