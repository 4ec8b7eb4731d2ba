"""The benchmark runs end to end on tiny models, and its ratios are what they say."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from click import ClickException
from click.testing import CliRunner, Result

from adaptspec.cli import build_cli
from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.testing.fakes import tiny_model, tiny_module, tiny_tokenizer
from adaptspec.workloads import Prompt, Workload

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def tables() -> Any:
    return benchmark("tables")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_module("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # an absent hub is asked for long
        capture_output=True,
        text=True,
        check=False,
    )


def invoked(*arguments: str) -> Result:
    """The same in this process, which has imported already what it needs."""
    return CliRunner().invoke(benchmark("run").main, arguments)


@pytest.mark.slow
def test_vllm_reads_the_heads_it_can_and_computes_what_we_do() -> None:
    """Where ADAPTSPEC_VLLM_PYTHON names the Python of an environment with vLLM."""
    if not (python := os.environ.get("ADAPTSPEC_VLLM_PYTHON")):
        pytest.skip("ADAPTSPEC_VLLM_PYTHON is not set")
    script = BENCHMARKS / "heads_vllm.py"
    done = subprocess.run(
        [sys.executable, str(script), "--vllm-python", python],
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    for label in (
        "joint, two blocks",
        "own",
        "own, two blocks",
        "joint, reduced vocabulary",
    ):
        assert told[label].startswith("read")
        assert told[label].endswith("agree in 100%")
    assert told["own, reduced vocabulary"].startswith("refused")


@pytest.mark.slow
def test_the_command_writes_what_it_prints(model: Path, tmp_path: Path) -> None:
    workload = tmp_path / "w.jsonl"
    lines = [
        {"id": "a", "class": "x", "prompt": "one two one two one"},
        {"id": "b", "class": "y", "prompt": "three four"},
        {"id": "c", "class": "y", "prompt": "five " * 60},
    ]
    workload.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "out.json"
    done = run(
        *("-m", str(model), "--draft-model", str(model), "--workload", str(workload)),
        *("--per-class", "5", "--max-prompt-tokens", "40", "-n", "6", "--repeats", "2"),
        *("--strategies", "prompt_lookup,draft_model", "--hf-sweep"),
        *("--contender", "prompt_lookup:2=prompt_lookup:draft_length=2"),
        *("--parts", "verify,curve,drafting,choosing,help", "--json", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert "y: 1 prompts over 40 tokens" in done.stderr
    result = json.loads(output.read_text())
    assert set(result["settings"]) == {
        *("hf_generate", "autoregressive", "draft_model"),
        *("hf_prompt_lookup:3", "hf_prompt_lookup:5", "hf_prompt_lookup:10"),
        *("hf_assisted:3", "hf_assisted:5", "hf_assisted:20"),
        *("prompt_lookup", "prompt_lookup:2"),
    }
    assert len(result["runs"]) == 2 * 2 * 11
    assert {row["class"] for row in result["table"]} == {"x", "y", "all"}
    for row in result["table"]:
        assert row["identical"] == row["prompts"], row
        assert row["contender"] in done.stdout
    for step in result["verify_step"]:
        assert all(math.isfinite(x) and x > 0 for x in step["ratio"])
    assert all(ms > 0 for ms in result["forward_ms"].values())
    drafted = {(d["strategy"], d["context"]) for d in result["drafting"]}
    assert {("prompt_lookup", 1024), ("prompt_lookup", 16384)} <= drafted
    assert result["choosing_ms"] > 0


@pytest.mark.slow
def test_ours_alone_are_measured_without_anybody_else_s(
    model: Path, tmp_path: Path
) -> None:
    workload = tmp_path / "w.jsonl"
    lines = [
        {"id": f"{name}{i}", "class": name, "prompt": f"one two {i} one two"}
        for name in "xy"
        for i in range(3)
    ]
    workload.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "out.json"
    done = invoked(
        *("-m", str(model), "--workload", str(workload), "-n", "6"),
        *("--skip", "1", "--per-class", "1", "--baselines", "none"),
        *("--strategies", "suffix", "--parts", "none", "--json", str(output)),
    )
    assert done.exit_code == 0, done.stderr
    runs = json.loads(output.read_text())["runs"]
    assert {(r["contender"], r["prompt"]) for r in runs} == {
        (name, prompt)
        for name in ("autoregressive", "suffix")
        for prompt in ("x1", "y1")
    }
    assert "geometric mean" in done.stdout


@pytest.mark.slow
def test_together_ours_take_turns_and_say_what_they_say_alone(
    model: Path, tmp_path: Path
) -> None:
    workload = tmp_path / "w.jsonl"
    lines = [
        {"id": "a", "class": "x", "prompt": "one two one two one"},
        {"id": "b", "class": "y", "prompt": "three four"},
    ]
    workload.write_text("\n".join(map(json.dumps, lines)))
    found = []
    for more in ([], ["--together"], ["--together", "--held"]):
        output = tmp_path / "out.json"
        done = invoked(
            *("-m", str(model), "--draft-model", str(model), "-n", "12", *more),
            *("--workload", str(workload), "--baselines", "none", "--keep"),
            *("--strategies", "suffix,draft_model", "--parts", "none"),
            *("--json", str(output)),
        )
        assert done.exit_code == 0, done.stderr
        result = json.loads(output.read_text())
        assert result["together"] is ("--together" in more)
        assert result["held"] is ("--held" in more)
        assert all(run["ms_per_token"] > 0 for run in result["runs"])
        found.append(
            [(run["contender"], run["prompt"], run["tokens"]) for run in result["runs"]]
        )
    assert found[0] == found[1] == found[2]


def test_a_warm_up_teaches_nothing_and_an_answer_does() -> None:
    engine, host = Engine(tiny_model("llama")), Host.installed()

    def forwards(before: str) -> float:
        contenders = benchmark("contenders")
        ours = contenders.Ours(engine, host, "token_recycling", {}, keep=True)
        if before:
            getattr(ours, before)([1, 2, 3], 24)
        found: float = ours([1, 2, 3], 24)[2]
        return found

    assert forwards("warm_up") == forwards("") < forwards("__call__")


@pytest.mark.slow
def test_a_missing_model_is_one_line() -> None:
    missing = run("-m", "nowhere-at-all", "--parts", "none")
    assert missing.returncode == 1
    assert "Error: " in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--parts", "sped"], "got sped"),
        (["--contender", "x", "--parts", "none"], "LABEL=strategy"),
        (["--contender", "hf_generate=suffix:tree=no"], "'hf_generate' is taken"),
        (["--baselines", "nobody", "--parts", "none"], "got 'nobody'"),
        (["--max-prompt-tokens", "0", "--parts", "none"], "no prompt is short enough"),
    ],
)
def test_bad_options_are_one_line(
    model: Path, arguments: list[str], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTSPEC_NATIVE", "0")
    done = invoked("-m", str(model), *arguments)
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)
    assert rule in done.stderr


def test_ratios_are_paired_by_prompt_over_the_repeats_median(tables: Any) -> None:
    times: dict[tuple[str, str], list[float | None]] = {
        ("hf_generate", "p"): [100.0, 90.0, 110.0],
        ("hf_generate", "q"): [200.0, 210.0, 190.0],
        ("autoregressive", "p"): [50.0, 70.0, 60.0],
        ("autoregressive", "q"): [100.0, 100.0, 100.0],
        ("hf_prompt_lookup:3", "p"): [40.0] * 3,
        ("hf_prompt_lookup:3", "q"): [200.0] * 3,
        ("hf_prompt_lookup:10", "p"): [100.0] * 3,
        ("hf_prompt_lookup:10", "q"): [50.0] * 3,
        ("prompt_lookup", "p"): [20.0] * 3,
        ("prompt_lookup", "q"): [25.0, None, 25.0],
        ("mine", "p"): [80.0] * 3,
        ("mine", "q"): [25.0] * 3,
    }

    def kind(name: str) -> str:
        return {"mine": "hybrid"}.get(name, name.partition(":")[0])

    kinds = {name: kind(name) for name, _ in times}
    runs = [
        tables.TimedAnswer(
            name, prompt, f"class {prompt}", [1, repeat], ms, 2.0, repeat
        )
        for (name, prompt), found in times.items()
        for repeat, ms in enumerate(found)
    ]
    rows = {
        (row["class"], row["contender"]): row
        for row in tables.summarise(runs, {("prompt_lookup", "q"): True}, kinds)
    }
    ours = rows["all", "prompt_lookup"]
    assert ours["ms_per_token"][1] == median([20.0, 25.0])
    assert ours["times_hf"][1] == median([100 / 20, 200 / 25])
    assert ours["times_plain"][1] == median([60 / 20, 100 / 25])
    assert ours["near_ties"] == 1
    assert rows["class p", "prompt_lookup"]["rival"] == "hf_prompt_lookup:3"
    assert rows["class p", "prompt_lookup"]["times_rival"][1] == 2.0
    assert rows["class q", "prompt_lookup"]["rival"] == "hf_prompt_lookup:10"
    assert rows["class q", "prompt_lookup"]["times_rival"][1] == 2.0
    assert ours["rival"] == "hf_prompt_lookup:10"  # medians 120 and 75
    assert rows["all", "autoregressive"]["rival"] is None
    assert rows["class p", "mine"]["rival"] == "hf_prompt_lookup:3"
    assert rows["class p", "mine"]["times_rival"][1] == 0.5
    assert rows["class q", "mine"]["times_rival"][1] == 2.0
    assert rows["all", "hf_generate"]["times_hf"] == [1.0, 1.0, 1.0]


def test_means_are_geometric_and_of_the_prompts_that_all_were_timed_on(
    tables: Any,
) -> None:
    times: dict[str, dict[str, float | None]] = {
        "autoregressive": {"p": 100.0, "q": 100.0, "r": 100.0},
        "mine": {"p": 50.0, "q": 12.5, "r": None},
    }
    runs = [
        tables.TimedAnswer(name, prompt, "c", [1], ms, 2.0)
        for name, found in times.items()
        for prompt, ms in found.items()
    ]
    kinds = {"autoregressive": "autoregressive", "mine": "hybrid"}
    rows = {
        row["contender"]: row
        for row in tables.summarise(runs, {}, kinds)
        if row["class"] == "all"
    }
    assert rows["mine"]["mean_times_plain"] == pytest.approx(4.0)
    assert rows["mine"]["mean_ms"] == pytest.approx(25.0)
    assert rows["autoregressive"]["mean_ms"] == pytest.approx(100.0)


def test_outputs_that_differ_from_plain_are_not_counted_identical(tables: Any) -> None:
    runs = [
        tables.TimedAnswer("hf_generate", "p", "c", [1, 2], 2.0, None),
        tables.TimedAnswer("hf_generate", "p", "c", [1, 2], 2.0, None, 1),
        tables.TimedAnswer("suffix", "p", "c", [1, 4], 2.0, None),
        tables.TimedAnswer("suffix", "p", "c", [1, 2], 2.0, None, 1),
        tables.TimedAnswer("autoregressive", "p", "c", [1, 2], 1.0, 1.0),
        tables.TimedAnswer("prompt_lookup", "p", "c", [1, 3], 1.0, 1.0),
    ]
    rows = {
        row["contender"]: row
        for row in tables.summarise(runs, {}, {run.contender: "x" for run in runs})
        if row["class"] == "c"
    }
    assert rows["hf_generate"]["identical"] == 1
    assert rows["prompt_lookup"]["identical"] == 0
    assert rows["suffix"]["identical"] == 0  # one of its repeats differed


def test_held_out_prompts_gain_by_what_was_best_for_their_class_when_tuning() -> None:
    ratios = {
        "a1": {"x": 2.0, "y": 1.5},
        "b1": {"x": 0.5, "y": 1.2},
        "c1": {"x": 0.5, "y": 0.9},  # plain decoding is best
        "a2": {"x": 3.0, "y": 9.0},
        "b2": {"x": 9.0, "y": 0.8},
        "c2": {"x": 9.0, "y": 9.0},
        "d2": {"x": 1.1, "y": 9.0},  # of no class that was tuned on
    }
    logs = {
        name: {key: math.log(value) for key, value in found.items()}
        for name, found in ratios.items()
    }
    tuning = [Prompt(name, name[0], text="") for name in ("a1", "b1", "c1")]
    held_out = [Prompt(name, name[0], text="") for name in ("a2", "b2", "c2", "d2")]
    gained = benchmark("classing").gained
    plainly = gained(tuning, held_out, logs, None)
    assert plainly == pytest.approx((3.0 * 0.8 * 1.0 * 1.0) ** (1 / 4))
    assert gained(tuning, held_out, logs, "x") == pytest.approx(
        (3.0 * 0.8 * 1.0 * 1.1) ** (1 / 4)
    )


def test_classes_that_are_told_rightly_gain_what_declared_ones_do() -> None:
    texts = {"sums": "what is 17 times 25 plus {}", "verse": "write verses on rain {}"}
    prompts = [
        Prompt(f"{name}{i}", name, text=text.format(i))
        for name, text in texts.items()
        for i in range(8)
    ]
    # Of each class another setting is the best.
    ratios = {
        p.id: {"x": 2.0, "y": 0.5} if p.prompt_class == "sums" else {"x": 0.5, "y": 1.8}
        for p in prompts
    }
    classing = benchmark("classing")
    found = classing.compared(Workload("w", tuple(prompts)), ratios, 0)
    assert found[classing.TOLD] == pytest.approx(found[classing.DECLARED])
    assert found[classing.DECLARED] == pytest.approx((2.0 * 1.8) ** 0.5)
    assert found[classing.ONE] < 1.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "asked"),
    [
        (1, {"false": 0.1}),  # nothing faster, 8 classes of 4
        (4, {"found": 0.9}),  # 1.15x on all of them
        (5, {"found": 0.85}),  # 1.15x on a class of 20 alone
    ],
)
def test_decisions_are_worth_what_is_said_of_them(
    place: int, asked: dict[str, float]
) -> None:
    """60 tunes of each world; `python benchmarks/deciding.py` does more."""
    deciding = benchmark("deciding")
    from adaptspec_tuner.deciding.rule import Rule

    world = deciding.asked(0.7)[place]
    tally = deciding.simulate(world, 60, Rule(draws=500, gain=None))
    covered = sum(tally.covered) / len(tally.covered)
    assert 0.93 < covered < 0.97
    if "false" in asked:
        assert tally.false / tally.tunes <= asked["false"]
    if "found" in asked:
        gained = (world.gains > 0).any(axis=1)
        assert tally.right[gained].mean() / tally.tunes >= asked["found"]
        assert abs(sum(tally.errors) / len(tally.errors)) < 0.03
    assert len(deciding.row(world, tally).split("|")) == 8


def tuned(winner: str, **ratios: tuple[float, int]) -> dict[str, Any]:
    rows = [
        {"strategy": name, "params": {"k": k}, "ratio": ratio}
        for name, (ratio, k) in {"autoregressive": (1.0, 0), **ratios}.items()
    ]
    found = {"class": "chat", "winner": winner, "params": {}, "results": rows}
    return {"classes": [found]}


def test_ratios_of_a_disturbed_tune_are_set_beside_the_quiet_ones() -> None:
    disturbed = benchmark("disturbed")
    found = disturbed.compared(
        tuned("a", a=(2.0, 1), b=(1.5, 1)),
        tuned("b", a=(2.2, 1), b=(1.2, 2), c=(3.0, 1)),
    )
    assert found["same"] == 0
    assert found["classes"]["chat"]["ratios"] == {
        "a": [2.0, 2.2, True],
        "b": [1.5, 1.2, False],
    }
    assert found["settings"] == pytest.approx([0.1])
    assert found["strategies"] == pytest.approx([0.1, 0.2])
    same = disturbed.compared(tuned("a", a=(2.0, 1)), tuned("a", b=(2.0, 1)))
    assert (same["same"], same["strategies"]) == (1, [])
    assert disturbed.compared(tuned("a"), {"classes": []})["missing"] == ["chat"]


@pytest.mark.slow
def test_what_two_tunes_chose_is_measured_again(model: Path, tmp_path: Path) -> None:
    longer = benchmark("longer_tune")
    workload, out = tmp_path / "w.jsonl", tmp_path / "out.json"
    lines = [
        {"id": f"{i}", "class": "x", "prompt": f"one two {i} one two"} for i in range(4)
    ]
    workload.write_text("\n".join(map(json.dumps, lines)))
    stores = [str(tmp_path / name) for name in ("short.db", "long.db")]
    for store in stores:
        host = Host.installed()
        tuned = CliRunner().invoke(
            build_cli(host),
            [
                *("tune", "-m", str(model), "--workload", str(workload)),
                *("--db", store, "--trials", "2", "--strategies", "prompt_lookup"),
                *("-n", "8"),
            ],
            obj=host,
        )
        assert tuned.exit_code == 0, tuned.output
    done = CliRunner().invoke(
        longer.main,
        [
            *(*stores, "--model", str(model), "--workload", str(workload)),
            *("--max-new-tokens", "8", "--repeats", "1", "--json", str(out)),
        ],
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["x"]
    best = found["best"][0]
    assert best >= found["long"][1]
    assert found["to_best"] == pytest.approx(found["short"][1] / best)
    assert "best of the long" in done.output


def test_a_short_tune_is_compared_with_the_best_of_a_long_one() -> None:
    longer = benchmark("longer_tune")
    ratios = {"a": 1.5, "b": 2.0, "c": 1.6}
    assert longer.compared(ratios, "a", "c", ["b"]) == (1.5 / 1.6, 0.75)
    assert longer.told("x", [1.0, 0.9]) == "x: 0.950 ± 0.050 over 2 classes"


STANDS_STILL = """
import json, time
before = time.monotonic()
longest = 0
for _ in range(100):
    time.sleep(0.01)
    now = time.monotonic()
    before, longest = now, max(longest, now - before)
print(json.dumps({"longest": longest}))
"""


@pytest.mark.slow
def test_a_disturbed_command_is_stopped_and_goes_on() -> None:
    disturbed = benchmark("disturbed")
    command = [sys.executable, "-c", STANDS_STILL]
    found = disturbed.tune(command, load=(0.1, 0.2), pauses=[0.5], pause=1.5)
    assert found["longest"] > 1.4
    assert found["seconds"] > 2.0
    with pytest.raises(ClickException, match="no such thing"):
        disturbed.tune([sys.executable, "-c", "raise SystemExit('no such thing')"])


CHECKOUT = """
import unittest
import torch
from adaptspec.testing.fakes import tiny_module

class TinyTest(unittest.TestCase):
    def test_generate_greedy(self):
        ids = torch.tensor([[2, 3, 4, 2, 3, 4, 2, 3], [5, 6, 5, 6, 5, 6, 5, 6]])
        out = tiny_module("llama").generate(ids, max_new_tokens=8, do_sample=False)
        self.assertEqual(out.shape, (2, 16))

    def test_generate_beams(self):
        tiny_module("llama").generate(torch.tensor([[2, 3]]), num_beams=2, max_length=4)

    def test_generate_a_cache_that_only_generate_returns(self):
        out = tiny_module("llama").generate(
            torch.tensor([[2, 3]]), max_length=4, return_dict_in_generate=True
        )
        self.assertIsNotNone(out.cache)

    def test_generate_nothing(self):
        pass

    def test_generate_broken(self):
        self.fail("as it is")

    def test_of_something_else(self):
        self.fail("isn't run")
"""


@pytest.mark.slow
def test_transformers_tests_are_told_apart(tmp_path: Path) -> None:
    place = tmp_path / "tests" / "models" / "tiny"
    place.mkdir(parents=True)
    (place / "test_modeling_tiny.py").write_text(CHECKOUT)
    main = benchmark("transformers_tests").main
    done = CliRunner().invoke(main, [str(tmp_path), "--models", "tiny"])
    assert done.exit_code == 1, done.output
    rows = [line.strip("| ").split(" | ") for line in done.output.splitlines()]
    said = {row[0]: row[1:] for row in rows if row[0].startswith("test_")}
    assert said["test_generate_greedy"][:4] == ["all", "-", "-", "-"]
    assert said["test_generate_beams"][:2] == ["-", "all"]
    assert "num_beams" in said["test_generate_beams"][4]
    assert said["test_generate_a_cache_that_only_generate_returns"][2] == "all"
    assert said["test_generate_nothing"][3:] == ["all", "generates nothing"]
    assert "as it is" in said["test_generate_broken"][4]
    assert "test_of_something_else" not in said
    assert "1 passes, 1 refused, 1 fails, 2 not applicable" in done.output


def test_tasks_take_prompts_of_their_classes_in_turns(tmp_path: Path) -> None:
    harness = benchmark("lm_harness")
    path = tmp_path / "workload.jsonl"
    lines = [
        {"class": name, "messages": [{"role": "user", "content": f"{name} {number}"}]}
        for name in ("a", "b", "c")
        for number in range(3)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert harness.prompts_of(path, ("b", "a"), 3) == ["b 0", "a 0", "b 1"]
    with pytest.raises(ClickException, match="has 6 prompts of a, b"):
        harness.prompts_of(path, ("a", "b"), 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drift", "most"),
    [("NONE", 0.03), ("ABRUPT", 0.08), ("LOSING", 0.09), ("SLOW", 0.06)],
)
def test_a_choice_that_follows_use_loses_little_and_less_than_one_that_never_changes(
    drift: str, most: float
) -> None:
    """In worlds whose truth is known, of fixed seeds."""
    bandit = benchmark("bandit")
    learning = importlib.import_module("adaptspec.choosing.learning").Learning
    found = [
        bandit.simulated(bandit.Drift[drift], 300, learning(seed=seed), seed)
        for seed in range(8)
    ]
    lost = sum(one.to_oracle for one in found) / len(found)
    never = sum(one.tuned_to_oracle for one in found) / len(found)
    assert lost < most
    assert lost < never
    # Deaf, it loses what the tuned setting does.
    deaf = learning(
        seed=0, exploration=0, moved=0.01, shared=0, outlier=1, tokens=10**9
    )
    world = bandit.simulated(bandit.Drift[drift], 300, deaf, 0)
    assert world.to_oracle == pytest.approx(world.tuned_to_oracle)


def test_regret_is_the_time_lost_to_who_knows_better() -> None:
    bandit = benchmark("bandit")
    learning = importlib.import_module("adaptspec.choosing.learning").Learning
    # Two settings, the second better; the tune believes in the first, and so do we.
    requests = [([math.log(1.25), math.log(2.0)], [math.log(1.25), 0.0])] * 10
    sure = learning(exploration=0, memory=math.inf)
    found = bandit.regret(
        [[math.log(3)] * 4, [math.log(1.1)] * 4], iter(requests), sure
    )
    assert found.tuned_to_oracle == pytest.approx(2.0 / 1.25 - 1)
    assert found.to_oracle == pytest.approx(found.to_fixed)


def test_bars_compare_prompt_by_prompt_and_class_by_class() -> None:
    mixed = benchmark("mixed")
    plain, auto = "autoregressive", mixed.AUTOMATIC
    times = {
        "p1": {plain: 8.0, "a": 4.0, "b": 8.0, "hybrid": 2.0, auto: 4.0},
        "p2": {plain: 2.0, "a": 1.0, "b": 2.0, "hybrid": 0.5, auto: 0.5},
        "p3": {plain: 1.0, "a": 1.0, "b": 0.5, "hybrid": 0.5, auto: 1.0},
    }
    groups = {"x": ["p1", "p2"], "y": ["p3"]}
    ratio, error = mixed.compared(times, auto, plain, ["p1", "p2"])
    assert ratio == pytest.approx(math.sqrt(2 * 4))
    assert error == pytest.approx(ratio * math.log(2) / 2)
    strategies = {name: name for name in times["p1"] if name != auto}
    over, whole, oracle, fair, worst = mixed.bars(times, groups, strategies)
    assert "hybrid's, a (1.15 or more): 1.260 ±" in over  # 2 ** (1 / 3)
    assert "fixed setting, hybrid: 0.630 ±" in whole  # 2 ** (-2 / 3)
    assert "0.97 or more): 0.595 ±" in oracle  # the root of 1 / sqrt(2) and 1 / 2
    # The hybrid is best on either of x; y has no other prompt.
    assert "other prompts: 0.707 ±" in fair  # the root of 1 / 2 and 1
    assert "y (0.98 or more): 1.000 ±" in worst


def test_prompts_of_a_tune_and_of_a_test_are_different_ones() -> None:
    mixed = benchmark("mixed")
    workload = mixed.mixed_workload(mixed.EDITS)
    edits = workload.by_class()[mixed.EDIT]
    # Those of the examples, and the file twice: once in place of Spec-Bench.
    assert len(edits) == 8 + 12 + 12
    unique = Workload("w", tuple({p.id: p for p in edits}.values()))
    model = tiny_model("llama", tokenizer=tiny_tokenizer())
    first, second = mixed.halves(unique, model, 8, 5, 9999)
    assert (len(first), len(second)) == (8, 5)
    assert not {p.id for p in first} & {p.id for p in second}
    with pytest.raises(ClickException, match="lower --tune-per-class"):
        mixed.halves(unique, model, 20, 5, 9999)


@pytest.mark.slow
@pytest.mark.guarded
def test_mixed_requests_are_tuned_on_and_then_decoded_by_all(
    model: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "id": f"{c}{i}",
            "class": c,
            "prompt": " ".join(f"w{i * 7 + j}" for j in (3, 4)),
        }
        for c in "ab"
        for i in range(4)
    ]
    workload = tmp_path / "w.jsonl"
    workload.write_text("\n".join(json.dumps(row) for row in rows))
    asked = [
        *("-m", str(model), "--workload", str(workload), "--budget", "12"),
        *("--tune-per-class", "2", "--per-class", "1", "-n", "8"),
        *("--max-prompt-tokens", "9999", "--json", str(tmp_path / "out.json")),
    ]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "mixed.py"), *asked],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of the oracle of classes (0.97 or more): " in done.stdout
    assert "choosing and learning: " in done.stdout
    kept = json.loads((tmp_path / "out.json").read_text())
    assert set(kept["groups"]) == {"a", "b", "code_edit"}
    for times in kept["times"].values():
        assert {"autoregressive", "automatic choice", "hybrid"} <= set(times)
        assert all(seconds > 0 for seconds in times.values())


@pytest.mark.slow
def test_checks_for_a_gpu_run_on_a_cpu_and_find_faults(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = benchmark("gpu")
    arguments = [
        *(str(model), "--draft", str(model), "--device", "cpu", "--dtype", "float32"),
        *("--tokens", "6", "--rounds", "1", "--tiny", "llama", "--tiny", "bloom"),
    ]
    monkeypatch.setattr(gpu, "STRATEGIES", ("autoregressive", "draft_model"))
    monkeypatch.setattr(gpu, "TEXTS", ("w3 w4 w5 w3 w4 w5 w6",))
    done = CliRunner().invoke(gpu.main, arguments)
    assert done.exit_code == 0, done.output
    assert "| llama | tree | fixed | - | 5/5 | yes |" in done.output
    assert "| bloom | chain | dynamic | its layers make masks" in done.output
    assert "| rows | fixed ms | dynamic ms |" in done.output
    lines = [line for line in done.output.splitlines() if line.startswith("| draft_m")]
    assert [line.split(" | ")[1] for line in lines] == ["fixed", "dynamic"]
    assert all(line.endswith("| 1/1 | yes |") for line in lines)
    assert "0 faults" in done.output

    own = gpu.own_greedy
    monkeypatch.setattr(
        gpu, "own_greedy", lambda *given: [token + 1 for token in own(*given)]
    )
    done = CliRunner().invoke(gpu.main, ["--device", "cpu", "--tiny", "llama"])
    assert done.exit_code == 1
    assert "FAULT: tiny llama: 0 of 5 equal" in done.output

    done = CliRunner().invoke(gpu.main, ["--device", "cpu", "--limit", "0"])
    assert "left out for want of time: tiny llama" in done.output


def test_a_grid_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    from adaptspec.engines.inference_engine import EngineOptions
    from adaptspec.testing.scripted_engine import (
        Machine,
        copies_and_drafts,
        engine_on,
        workload_of,
    )

    grid = benchmark("engine_grid")
    truth = copies_and_drafts({"code": (0.2, 0.9), "chat": (-0.05, 0.3)})
    cls = engine_on(Machine(truth, room=2))
    prompts = workload_of(["code", "chat"], 2).prompts
    settings = [("copy", '{"length": 4}'), ("draft", '{"length": 4}')]
    path = tmp_path / "measured.json"
    engine = cls(EngineOptions(model="m"))
    with engine:
        first = grid.Measured(path)
        turns = iter([True, False])
        grid.measure(engine, settings, prompts, 16, first, in_time=lambda: next(turns))
        assert list(first.ratios) == settings[:1]
        asked = engine.answers
        again = grid.Measured(path)
        grid.measure(engine, settings, prompts, 16, again)
        answered = [(method, ids) for method, _, ids in engine.log[asked:]]
        assert [method for method, _ in answered if method == "copy"] == []
    assert grid.Measured(path).ratios == again.ratios
    assert list(again.ratios) == settings
    # By the truth drafting pays for code alone.
    ratios = again.ratios[settings[1]]
    assert min(ratios["code/0"], ratios["code/1"]) > 1.2


def test_a_grids_best_is_judged_on_prompts_it_was_not_picked_on() -> None:
    grid = benchmark("engine_grid")
    prompts = [Prompt("a", text="a"), Prompt("b", text="b")]
    # Each is the best on one prompt, by luck, and a loss on the other.
    ratios = {("x", "{}"): {"a": 2.0, "b": 0.5}, ("y", "{}"): {"a": 0.5, "b": 2.0}}
    assert grid.best(ratios, prompts[:1]) == (("x", "{}"), 2.0)
    assert grid.best_of_others(ratios, prompts) == pytest.approx(0.5)
    assert math.isnan(grid.best_of_others(ratios, prompts[:1]))
    # Where nothing is faster, plain decoding is the grid's best.
    slow = {("x", "{}"): {"a": 0.8, "b": 0.9}}
    assert grid.best(slow, prompts) == (("autoregressive", "{}"), 1.0)
    assert grid.best_of_others(slow, prompts) == 1.0
