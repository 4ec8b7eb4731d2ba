"""From prompts to heads on disk, on tiny models, through kills and bad input."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file

from adaptspec.cli import build_cli
from adaptspec.cli.progress import Progress
from adaptspec.errors import HeadsLoadError, TrainingError
from adaptspec.heads.checkpoints import read_heads
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import FakeClock
from adaptspec.testing.heads import show_other_states
from adaptspec_training.conversations import Example
from adaptspec_training.options import Options
from adaptspec_training.pipeline import _split, train_medusa

pytestmark = pytest.mark.slow

QUICK = Options(
    heads=2,
    draft_vocab=0,
    epochs=3,
    batch_tokens=40,
    warmup_steps=2,
    max_new_tokens=10,
    answer_batch=4,
    temperature=0.0,
    held_out=0.25,
    seed=1,
)


SAVES_ALWAYS = """
import adaptspec_training.trainer as t
init = t.Schedule.__init__
t.Schedule.__init__ = lambda self, **k: init(self, **k, save_seconds=0.0)
from adaptspec.cli import main
main(arguments)
"""


@pytest.fixture
def folder(target: Callable[..., LanguageModel], tmp_path: Path) -> Path:
    """A tiny model on disk."""
    model = target("llama")
    path = tmp_path / "model"
    model.source.save_pretrained(path)  # type: ignore[operator]
    model.tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"output": "joint", "draft_vocab": 20}, "joint"),
        ({"output": "joint"}, "joint"),
        ({"output": "own"}, "own"),
        ({"output": "base"}, "base"),
        ({"output": "own", "draft_vocab": 20, "layers": 2}, "own"),
    ],
)
def test_heads_of_every_kind_are_trained_stored_and_read_back(
    target: Callable[..., LanguageModel],
    prompts: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: str,
) -> None:
    model = target()
    options = replace(QUICK, **changes)
    trained = train_medusa(model, prompts, tmp_path / "out", options)
    read = read_heads(tmp_path / "out", 32, model.vocab_size)
    assert read.heads.output == kind
    assert len(read.heads.blocks) == 2
    assert read.heads.layers == options.layers
    assert read.heads.draft_vocab == (options.draft_vocab or model.vocab_size)
    assert read.paths is not None
    assert read.ranks is not None
    assert [len(path) for path, _ in read.paths]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["training"]["examples"] == 9
    assert report["training"]["held_out_examples"] == 3
    log = trained.report["log"]
    assert log[0]["step"] == 0
    assert [entry["step"] for entry in log] == sorted(e["step"] for e in log)
    assert math.isfinite(log[-1]["loss"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Held-out accuracy" in page
    assert "http://" not in page.split("</script>")[-1]


def test_heads_learn_what_the_model_says(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    # Answers that a tiny model repeats are learnt by heart: the right look-ahead is
    # the only one under which that helps on prompts not trained on.
    model = target(initializer_range=0.02)
    options = replace(
        QUICK, epochs=150, max_new_tokens=24, learning_rate=5e-3, batch_tokens=100
    )
    trained = train_medusa(model, prompts, tmp_path / "out", options)
    first, last = trained.report["log"][0], trained.report["log"][-1]
    for before, after in zip(first["heads"], last["heads"], strict=True):
        assert after["top1"] > max(0.4, before["top1"] + 0.3)


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_a_quantised_target_is_trained_for(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path, load_in: str
) -> None:
    pytest.importorskip("bitsandbytes")
    model = target(hidden_size=64, intermediate_size=128)
    model.source.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    model.tokenizer.save_pretrained(tmp_path / "model")
    train_medusa(tmp_path / "model", prompts, tmp_path / "out", QUICK, load_in=load_in)
    assert read_heads(tmp_path / "out", 64, model.vocab_size).paths
    joint = replace(QUICK, method="medusa-2")
    with pytest.raises(TrainingError, match="load it unquantised"):
        train_medusa(tmp_path / "model", prompts, tmp_path, joint, load_in=load_in)


def test_features_kept_and_computed_again_give_the_same_heads(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    for features in ("store", "recompute"):
        options = replace(QUICK, features=features, epochs=1)
        train_medusa(target(), prompts, tmp_path / features, options)
    stored = tensors(tmp_path / "store")
    computed = tensors(tmp_path / "recompute")
    assert stored.keys() == computed.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, computed[name], rtol=1e-3, atol=1e-3)


def test_given_answers_are_learnt_from_as_they_are(
    target: Callable[..., LanguageModel],
    write_lines: Callable[..., Path],
    tmp_path: Path,
) -> None:
    data = write_lines(
        *(
            {
                "messages": [
                    {"role": "user", "content": "w2 w3"},
                    {"role": "assistant", "content": "w4 w5 w6 w7 w8 w9 w10"},
                ]
            }
            for _ in range(10)
        )
    )
    options = replace(QUICK, epochs=150, learning_rate=5e-3)
    trained = train_medusa(target(), data, tmp_path / "out", options)
    assert [head["top1"] for head in trained.report["heads"]] == [1.0, 1.0]


def test_medusa_2_keeps_the_targets_own_loss_in_sight(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    model = target()
    before = {k: v.clone() for k, v in model.source.state_dict().items()}
    options = replace(QUICK, method="medusa-2", epochs=1, joint_epochs=2)
    trained = train_medusa(model, prompts, out, options)
    guarded = trained.report["target_loss"]
    assert guarded["after"] == pytest.approx(guarded["before"], abs=0.3)
    assert {entry["stage"] for entry in trained.report["log"]} == {"heads", "joint"}
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    changed = [
        name
        for name, value in merged.state_dict().items()
        if not torch.equal(value, before[name])
    ]
    assert changed
    assert not [name for name in changed if "lm_head" in name or "embed" in name]
    for name, value in model.source.state_dict().items():
        assert torch.equal(value, before[name]), "the caller's model was changed"


def test_the_model_writes_its_own_prompts(
    target: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    model = target()
    model.tokenizer.chat_template = (
        "{% for message in messages %}w5 {{ message['content'] }} <eos>\n{% endfor %}"
    )
    options = replace(QUICK, self_prompts=6)
    trained = train_medusa(model, None, tmp_path / "out", options)
    (path,) = (tmp_path / "out" / "work").glob("prompts-*.jsonl")
    texts = [json.loads(row)["prompt"] for row in path.read_text().splitlines()]
    assert 2 <= len(texts) == len(set(texts)) <= 6
    assert trained.report["training"]["examples"] >= 1
    # Other prompts than those asked for now aren't taken for them.
    with pytest.raises(TrainingError, match="--fresh"):
        train_medusa(model, None, tmp_path / "out", replace(options, self_prompts=3))


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    folder: Path, prompts: Path, tmp_path: Path, fork: Any
) -> None:
    def start(out: str) -> Any:
        options = (
            f"train medusa -m {folder} --data {prompts} --out {tmp_path / out} "
            "--heads 2 --draft-vocab 0 --epochs 60 --batch-tokens 30 -n 10 "
            "--answer-batch 2 --temperature 0.7 --threads 1"
        )
        return fork(SAVES_ALWAYS, arguments=options.split())

    whole = start("whole")
    assert whole.wait() == 0, whole.communicate()
    draw = random.Random(0)
    kills = 0
    work = tmp_path / "killed" / "work"
    while kills < 5:
        process = start("killed")
        # Once it has begun to work: before, a kill has nothing to spoil.
        seen = footprint(work)
        while process.poll() is None and footprint(work) == seen:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    last = start("killed")
    assert last.wait() == 0, last.communicate()
    undisturbed, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert undisturbed.keys() == killed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, killed[name]), name


def footprint(work: Path) -> list[tuple[str, int, int]]:
    found = []
    for path in work.rglob("*"):
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            continue
        found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def test_answers_are_kept_when_the_training_options_change(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    model, out = target(), tmp_path / "out"
    train_medusa(model, prompts, out, QUICK)
    answers = (out / "work" / "answers" / "answers.jsonl").read_bytes()
    train_medusa(model, prompts, out, replace(QUICK, epochs=1, heads=1))
    assert (out / "work" / "answers" / "answers.jsonl").read_bytes() == answers
    assert len(read_heads(out, 32, model.vocab_size).heads.blocks) == 1
    with pytest.raises(TrainingError, match="--fresh"):
        train_medusa(model, prompts, out, replace(QUICK, max_new_tokens=5))
    train_medusa(model, prompts, out, replace(QUICK, max_new_tokens=5), fresh=True)


def test_a_budget_for_answers_is_not_granted_anew_to_a_run_that_continues(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    model, out = target(), tmp_path / "out"
    # Twelve prompts in batches of four; a second passes at each look at the clock.
    options = replace(QUICK, answer_seconds=2.0)
    first = train_medusa(
        model, prompts, out, options, clock=FakeClock(tick=1.0)
    ).report["training"]
    weights = tensors(out)
    again = train_medusa(
        model, prompts, out, options, clock=FakeClock(tick=1.0)
    ).report["training"]
    assert first["examples"] + first["held_out_examples"] == 8
    assert again["examples"] == first["examples"]
    for name, tensor in tensors(out).items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"self_prompts": 4}, "not both"),
        ({"held_out": 1.0}, "0 < held_out < 1"),
        ({"answers": "given"}, "--answers self"),
    ],
)
def test_options_that_contradict_are_refused(
    target: Callable[..., LanguageModel],
    prompts: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(TrainingError, match=problem):
        train_medusa(target(), prompts, tmp_path / "out", replace(QUICK, **changes))


def test_a_model_whose_states_are_not_its_lm_heads_input_is_refused_before_it_answers(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    model = target()
    show_other_states(model)
    with pytest.raises(TrainingError, match="aren't what its LM head reads"):
        train_medusa(model, prompts, tmp_path / "out", QUICK)
    assert not (tmp_path / "out" / "work" / "answers").exists()


def test_a_model_that_could_never_use_heads_is_refused_before_it_answers(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="can't verify drafts"):
        train_medusa(target("mamba"), prompts, tmp_path / "out", QUICK)
    assert not (tmp_path / "out" / "work" / "answers").exists()


def test_a_folder_with_others_weights_is_refused_before_anything_is_done(
    prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"of somebody")
    with pytest.raises(HeadsLoadError, match="give another folder"):
        train_medusa("no model is looked for", prompts, tmp_path, QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="choose another --out"):
        train_medusa("no model", prompts, tmp_path / "file" / "out", QUICK)


def test_a_run_that_continues_keeps_hidden_states_where_the_first_one_did(
    target: Callable[..., LanguageModel],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, again = target(), replace(QUICK, epochs=1)
    train_medusa(model, prompts, tmp_path / "once", again)
    train_medusa(model, prompts, tmp_path / "twice", QUICK)
    free = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    train_medusa(model, prompts, tmp_path / "twice", again)
    assert (tmp_path / "twice" / "work" / "answers" / "features.bin").exists()
    once, twice = tensors(tmp_path / "once"), tensors(tmp_path / "twice")
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name
    # Another run, which begins on the full disk, keeps none.
    train_medusa(model, prompts, tmp_path / "full", again)
    assert not (tmp_path / "full" / "work" / "answers" / "features.bin").exists()


def test_prompts_that_leave_no_room_for_an_answer_are_left_out_and_counted(
    target: Callable[..., LanguageModel],
    write_lines: Callable[..., Path],
    tmp_path: Path,
) -> None:
    data = write_lines(*({"prompt": "w3 " * n} for n in (3, 4, 5, 30, 6, 31)))
    told = io.StringIO()
    progress = Progress(Console(file=told), FakeClock())
    options = replace(QUICK, max_length=14)
    trained = train_medusa(target(), data, tmp_path, options, progress=progress)
    assert "2 of 6 prompts leave no room" in told.getvalue()
    kept = trained.report["training"]
    assert kept["examples"] + kept["held_out_examples"] == 4
    lines = (tmp_path / "work" / "answers" / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert max(len(row["tokens"]) for row in rows if "tokens" in row) <= 14


def test_the_time_told_is_that_of_all_processes(
    target: Callable[..., LanguageModel], prompts: Path, tmp_path: Path
) -> None:
    first = train_medusa(target(), prompts, tmp_path, QUICK).report["training"]
    again = train_medusa(target(), prompts, tmp_path, QUICK).report["training"]
    assert again["seconds"] == first["seconds"]
    assert first["seconds"]["answers"] > 0
    assert first["seconds"]["heads"] > 0


def test_no_more_prompts_than_are_useful_are_held_out() -> None:
    examples = [Example(f"p{i}#0", (1, 2, 3), ((1, 3),)) for i in range(3000)]
    train, held_out = _split(examples, QUICK)
    assert len(held_out) == 200
    assert sorted([*train, *held_out]) == list(range(3000))


def test_one_prompt_is_too_few_to_measure_on(
    target: Callable[..., LanguageModel],
    write_lines: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(TrainingError, match="at least two prompts"):
        train_medusa(
            target(), write_lines({"prompt": "w2 w3"}), tmp_path / "out", QUICK
        )


def test_the_command_trains_and_says_what_comes_next(
    folder: Path, prompts: Path, tmp_path: Path
) -> None:
    run = CliRunner().invoke(
        build_cli(Host.installed()),
        [
            *("train", "medusa", "-m", str(folder), "--data", str(prompts)),
            *("--out", str(tmp_path / "heads"), "--heads", "1", "--epochs", "1"),
            *("-n", "6", "--draft-vocab", "16"),
        ],
        obj=Host.installed(),
    )
    assert run.exit_code == 0, run.output
    assert "adaptspec tune --heads" in run.output
    assert "Held-out text" in run.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--data", "none.jsonl"], "can't read the workload"),
        ([], "--self-prompts"),
        (["--answer-budget", "60 trials"], "--answer-budget must be a time"),
    ],
)
def test_bad_calls_are_one_line(
    folder: Path, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    run = CliRunner().invoke(
        build_cli(Host.installed()),
        [
            *("train", "medusa", "-m", str(folder)),
            *("--out", str(tmp_path / "out"), *arguments),
        ],
        obj=Host.installed(),
    )
    assert run.exit_code == 1
    assert isinstance(run.exception, SystemExit)
    assert problem in run.stderr
