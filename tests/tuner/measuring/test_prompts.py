"""Prompts are checked before anything is measured, and each counts once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from adaptspec.cli import build_cli
from adaptspec.errors import AdaptSpecError, ModelLoadError, WorkloadError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.profile import PLAIN
from adaptspec.testing.fakes import POSITIONS, tiny_model, tiny_module, tiny_tokenizer
from adaptspec.workloads import Message, Prompt, Workload, read_workload, split
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.measuring.profiler import Profiler
from adaptspec_tuner.measuring.prompts import measurable
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.tune import tune


class Words:
    """A model that reads words, refuses some, and has room for ten tokens."""

    most_tokens = 10

    def ids(self, prompt: Prompt) -> Sequence[int]:
        if prompt.text is None and prompt.messages[0].role == "system":
            raise ValueError("System role not supported\nat line 3")
        texts = [m.content for m in prompt.messages] or [str(prompt.text)]
        # "b" and "c" are one token: another text, the same ids.
        return [min(ord(word[0]), ord("b")) for t in texts for word in t.split()]

    def length(self, prompt: Prompt) -> int:
        return prompt.max_new_tokens or 4


def texts(*found: str, prompt_class: str = "chat") -> tuple[Prompt, ...]:
    return tuple(
        Prompt(f"{prompt_class}{i}", prompt_class, text=text)
        for i, text in enumerate(found)
    )


def kept(prompts: Sequence[Prompt], **options: Any) -> tuple[list[str], list[str]]:
    said: list[str] = []
    found = measurable(
        Workload("w", tuple(prompts)), Words(), warn=said.append, **options
    )
    return [p.id for p in found.prompts], said


@pytest.mark.parametrize(
    ("same", "told"),
    [
        (texts("a b", "a b", "a b"), 2),
        (texts("a b", " a  b\n", "a\tb"), 2),
        (texts("a b", "a c"), 1),
        (texts("a b", "a"), 0),
    ],
)
def test_a_prompt_counts_once_in_its_class(same: tuple[Prompt, ...], told: int) -> None:
    ids, said = kept(same)
    assert len(ids) == len(same) - told
    assert ids[0] == "chat0"
    wanted = f"repeated prompts left out: {told}; in a class each counts once"
    assert said == [wanted] * (told > 0)


def test_chats_are_the_same_if_the_same_is_said_by_the_same() -> None:
    def chat(name: str, *turns: tuple[str, str]) -> Prompt:
        return Prompt(name, messages=tuple(Message(*turn) for turn in turns))

    one, two = ("user", "a"), ("assistant", "a")
    assert kept([chat("1", one), chat("2", one), chat("3", one, two)])[0] == ["1", "3"]


def test_another_class_has_evidence_of_its_own() -> None:
    prompts = (*texts("a b"), *texts("a b", prompt_class="code"))
    assert kept(prompts)[0] == ["chat0", "code0"]


def test_the_limit_is_of_different_prompts() -> None:
    prompts = (*texts("a", "a", "b", "b a"), *texts("a", prompt_class="code"))
    assert kept(prompts, limit=2)[0] == ["chat0", "chat2", "code0"]


def test_how_many_prompts_a_class_had_is_kept() -> None:
    prompts = texts("a", "b x", "c x", "d") + texts("a", prompt_class="code")
    workload = Workload("w", prompts)
    assert workload.counts == {"chat": 4, "code": 1}
    assert measurable(workload, Words(), limit=1).counts == {"chat": 4, "code": 1}


@pytest.mark.parametrize(
    ("bad", "wrong"),
    [
        (Prompt("x", text=" \n\t"), "white space"),
        (Prompt("x", messages=(Message("user", " "),)), "white space"),
        (
            Prompt("x", messages=(Message("system", "be brief"),)),
            "can't be encoded: System role not supported",
        ),
        (Prompt("x", text="a " * 9), r"prompt \+ 2 <= 10 tokens.*a prompt of 9"),
        (Prompt("x", text="a " * 99), "a prompt of 99"),
    ],
)
def test_a_prompt_that_cannot_be_decoded_is_named_or_left_out(
    bad: Prompt, wrong: str
) -> None:
    prompts = [*texts("a"), bad]
    with pytest.raises(WorkloadError, match=rf"^prompt 'x': .*{wrong}.*--skip-bad") as (
        caught
    ):
        kept(prompts)
    assert len(str(caught.value).splitlines()) == 1
    ids, said = kept(prompts, skip_bad=True)
    assert ids == ["chat0"]
    assert said[0].startswith("bad prompts left out: 1; the first: prompt 'x'")
    with pytest.raises(WorkloadError, match="no prompt of w is left"):
        kept([bad], skip_bad=True)


def test_outputs_that_the_models_length_cuts_are_told() -> None:
    assert kept(texts("a a a a a a a a", "b b"))[1] == [
        "prompts with room for fewer new tokens than asked for: 1; their outputs end "
        "at the model's 10 tokens"
    ]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": ""}', '{"prompt": "a", "id": "1"}', "\\xff"]
)
def test_bad_lines_are_left_out_if_that_is_asked_for(tmp_path: Path, line: str) -> None:
    path = tmp_path / "w.jsonl"
    content = line.encode().replace(b"\\xff", b"\xff")
    path.write_bytes(b'{"prompt": "a", "id": "1"}\n' + content + b'\n{"prompt": "b"}\n')
    with pytest.raises(WorkloadError, match="line 2"):
        read_workload(path)
    found = read_workload(path, skip_bad=True)
    assert [p.text for p in found.prompts] == ["a", "b"]
    assert [p.where for p in found.prompts] == [f"{path}, line 1", f"{path}, line 3"]
    (said,) = found.skipped
    assert f"{path}, line 2" in said


SYSTEM_REFUSED = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['content'] }} {% endfor %}"
)


def told(
    host: Host, tmp_path: Path, model: str, *lines: Any, skip: bool = False
) -> Any:
    """What ``tune`` answers to a workload of these lines behind four good ones."""
    workload = tmp_path / "mine.jsonl"
    good = [{"prompt": f"w{i} w3 w4 w{i + 1} w3 w4"} for i in range(2, 6)]
    workload.write_text("\n".join(map(json.dumps, [*good, *lines])))
    arguments = [
        *("tune", "--model", model, "--workload", str(workload), "--json"),
        *("--db", str(tmp_path / "p.db"), "--strategies", "prompt_lookup"),
        # The trials bound the work; the budget is for machines that are busy.
        *("--budget", "60s", "--trials", "2"),
        *("--max-new-tokens", "8", "--dtype", "float32"),
    ]
    arguments += ["--skip-bad"] if skip else []
    return CliRunner().invoke(build_cli(host), arguments, obj=host)


@pytest.fixture(scope="module")
def strict_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its chat template refuses a system role."""
    folder = tmp_path_factory.mktemp("strict")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SYSTEM_REFUSED
    tiny_module("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SYSTEM = {"messages": [{"role": "system", "content": "w2"}]}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (SYSTEM, "System role not supported"),
        ({"prompt": "w2 " * POSITIONS}, f"a prompt of {POSITIONS}"),
        ({"prompt": "  "}, "white space"),
    ],
)
def test_tune_names_file_and_line_before_anything_is_measured(
    host: Host,
    strict_model: str,
    tmp_path: Path,
    line: Any,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Profiler, "measure", lambda *a: pytest.fail("measured"))
    done = told(host, tmp_path, strict_model, line, SYSTEM)
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{tmp_path / 'mine.jsonl'}, line 5: " in done.stderr
    assert wrong in done.stderr
    assert "1 more" in done.stderr
    assert "--skip-bad" in done.stderr


@pytest.mark.slow
def test_tune_leaves_bad_lines_out_and_says_how_many(
    host: Host, strict_model: str, tmp_path: Path
) -> None:
    done = told(host, tmp_path, strict_model, SYSTEM, {"prompt": " "}, skip=True)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert any(note.startswith("bad prompts left out: 2;") for note in result["notes"])
    (found,) = result["classes"]
    assert all(r["prompts"] == 2 for r in found["results"])


@pytest.mark.slow
def test_a_prompt_eight_times_is_one_prompt_and_chooses_nothing(host: Host) -> None:
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    prompts = texts(*["w2 w3 w4 w2 w3 w4"] * 8)
    result = tune(
        model,
        workload=Workload("w", prompts),
        options=TuneOptions(budget=3.0, strategies=["prompt_lookup"], max_new_tokens=8),
        db=MemoryStore(),
        host=host,
    )
    (found,) = result.named
    assert found.reused
    assert found.choice.strategy == PLAIN
    assert {p.measurement.prompts for p in found.profiles} == {1}
    assert any(
        note.startswith("repeated prompts left out: 7;") for note in result.notes
    )


@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_no_prompt_is_both_tuned_on_and_held_out(repeats: int) -> None:
    prompts = [*texts(*(w for w in "abxyzw" for _ in range(repeats)))]
    found = measurable(Workload("w", tuple(prompts)), Words())
    tuning, held_out = split(found)
    both = [*tuning.prompts, *held_out.prompts]
    assert len({tuple(Words().ids(p)) for p in both}) == len(both)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_whose_logits_are_not_numbers_is_refused_by_name(
    host: Host, value: float
) -> None:
    module = tiny_module("llama")
    with torch.no_grad():
        module.lm_head.weight.fill_(value)
        module.model.norm.weight.fill_(1.0)
    model = LanguageModel(module, tiny_tokenizer(), "broken-1b")
    with pytest.raises(AdaptSpecError, match=r"broken-1b can't be tuned.*float32"):
        tune(
            model,
            workload=Workload("w", texts("w2 w3", "w4 w5")),
            options=TuneOptions(budget=3.0),
            db=MemoryStore(),
            host=host,
        )


def test_a_model_that_the_probe_refuses_is_not_tuned(
    host: Host, strict_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that isn't causal: it is refused by name, before anything is measured."""

    def refuse(model: LanguageModel) -> None:
        raise ModelLoadError(f"{model.name} isn't a causal language model; take one")

    monkeypatch.setattr("adaptspec.model.language_model.probe", refuse)
    monkeypatch.setattr(Profiler, "measure", lambda *a: pytest.fail("measured"))
    done = told(host, tmp_path, strict_model)
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines() == [
        f"Error: {Path(strict_model).name} isn't a causal language model; take one"
    ]
