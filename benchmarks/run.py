"""Our decoding against Hugging Face's own, interleaved, on any model and workload.

    python benchmarks/run.py --model M [--draft-model D] [--workload W] [--json OUT]

Every prompt is decoded greedily by every contender before the next prompt, in an order
that rotates, after a warm-up; so drift of the machine falls on all alike. Times are of
decoding alone, without the prefill. Nothing here asserts a speed.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from adaptspec.decoder import environment_of
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.host import Host
from adaptspec.models import LanguageModel, load_model
from adaptspec.selector import select
from adaptspec.strategy import Context, Drafter, Strategy, Target, TokenTree
from adaptspec_tuner.profiler import first_difference, near_tie
from adaptspec_tuner.workloads import Workload, example_workload, read_workload

HF, PLAIN = "hf_generate", "autoregressive"
FORWARD_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
STEP_ROWS = (1, 4, 8, 16)
CONTEXTS = (1024, 4096, 16384)
ROUNDS = 7


@dataclass(frozen=True)
class Run:
    """One prompt decoded by one contender."""

    contender: str
    prompt: str
    prompt_class: str
    tokens: list[int]
    ms_per_token: float
    tokens_per_forward: float | None


Contender = Callable[[Sequence[int], int], tuple[list[int], float, float | None]]


def ours(engine: Engine, host: Host, name: str, params: Mapping[str, Any]) -> Contender:
    """One of our strategies, a fresh instance per prompt."""
    cls = host.strategy(name)
    settings = cls.Params.parse(params, name)

    def run(ids: Sequence[int], length: int) -> tuple[list[int], float, float | None]:
        controls = Controls.for_model(
            engine.model, temperature=0, max_new_tokens=length
        )
        done = engine.generate(cls(settings), ids, controls)
        speed = done.stats.tokens_per_second
        return (
            done.token_ids,
            1e3 / speed if speed else float("nan"),
            done.stats.tokens_per_forward,
        )

    return run


def theirs(
    model: LanguageModel,
    draft: LanguageModel | None,
    host: Host,
    name: str,
    params: Mapping[str, Any],
) -> Contender:
    """One of Hugging Face's, on an untouched model."""
    cls = host.baselines[name]
    baseline = cls(cls.Params.parse(params, name))

    def run(ids: Sequence[int], length: int) -> tuple[list[int], float, float | None]:
        done = baseline.run(model, draft, ids, length)
        speed = done.tokens_per_second
        forwards = done.target_forwards
        decoded = len(done.token_ids) - done.first_tokens
        return (
            done.token_ids,
            1e3 / speed if speed else float("nan"),
            decoded / forwards if forwards else None,
        )

    return run


class Peer:
    """vLLM in its own process and Python, asked prompt by prompt."""

    def __init__(self, python: str, model: str, draft: str, method: str) -> None:
        script = str(Path(__file__).with_name("peer_vllm.py"))
        self._process = subprocess.Popen(
            [python, script, model, draft, method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(
                "vLLM ended; run benchmarks/peer_vllm.py by hand"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(
        self, ids: Sequence[int], length: int
    ) -> tuple[list[int], float, float | None]:
        """As every contender."""
        assert self._process.stdin is not None
        asked = json.dumps({"ids": list(ids), "length": length})
        print(asked, file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["tokens"], answer["ms_per_token"], None

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def decode_all(
    contenders: Mapping[str, Contender],
    prompts: Sequence[tuple[str, str, list[int], int]],
    say: Callable[[str], None],
) -> list[Run]:
    """Every prompt by every contender, interleaved."""
    names = list(contenders)
    for name in names:  # warm-up
        contenders[name](prompts[0][2], 4)
    runs = []
    for turn, (prompt_id, prompt_class, ids, length) in enumerate(prompts):
        say(f"prompt {turn + 1} of {len(prompts)} ({prompt_class}, {len(ids)} tokens)")
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            tokens, ms, per_forward = contenders[name](ids, length)
            runs.append(Run(name, prompt_id, prompt_class, tokens, ms, per_forward))
    return runs


def summarise(
    runs: Sequence[Run], baseline: str, ties: Mapping[tuple[str, str], bool]
) -> list[dict[str, Any]]:
    """Per class and contender: medians, quartiles, ratios paired by prompt."""
    by_key = {(r.contender, r.prompt): r for r in runs}
    classes = [*dict.fromkeys(r.prompt_class for r in runs), "all"]
    names = list(dict.fromkeys(r.contender for r in runs))
    rows = []
    for prompt_class in classes:
        for name in names:
            found = [
                r
                for r in runs
                if r.contender == name
                and prompt_class in (r.prompt_class, "all")
                and r.ms_per_token == r.ms_per_token
            ]
            if not found:
                continue
            ratios = [
                by_key[baseline, r.prompt].ms_per_token / r.ms_per_token
                for r in found
                if by_key[baseline, r.prompt].ms_per_token > 0
            ]
            forwards = [r.tokens_per_forward for r in found if r.tokens_per_forward]
            rows.append(
                {
                    "class": prompt_class,
                    "contender": name,
                    "prompts": len(found),
                    "ms_per_token": spread([r.ms_per_token for r in found]),
                    "times_hf": spread(ratios),
                    "tokens_per_forward": median(forwards) if forwards else None,
                    "identical": sum(
                        r.tokens == by_key[PLAIN, r.prompt].tokens for r in found
                    ),
                    "near_ties": sum(ties.get((name, r.prompt), False) for r in found),
                }
            )
    return rows


def spread(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return [values[0]] * 3 if values else [float("nan")] * 3
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def explained(
    model: LanguageModel, runs: Sequence[Run], prompts: Mapping[str, list[int]]
) -> dict[tuple[str, str], bool]:
    """For outputs that differ from our plain decoding: is it a tie within rounding?"""
    plain = {r.prompt: r.tokens for r in runs if r.contender == PLAIN}
    found = {}
    for run in runs:
        at = first_difference(plain[run.prompt], run.tokens)
        expected = plain[run.prompt]
        if at is None or at >= min(len(expected), len(run.tokens)):
            continue
        ids = [*prompts[run.prompt], *expected[:at]]
        logits = model.prefill(ids, model.new_cache(len(ids))).logits[-1]
        found[run.contender, run.prompt] = near_tie(
            logits, expected[at], run.tokens[at], model.dtype
        )
    return found


class Wrong(Strategy):
    """Proposes a chain nobody accepts, to time the verification of ``rows`` tokens."""

    name = "wrong"
    summary = "a rejected chain"

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def start(self, target: Target) -> Drafter:
        rows = self.rows

        class Drafting(Drafter):
            def propose(self, context: Context) -> TokenTree:
                return TokenTree.chain(context.ids[-1], [0] * (rows - 1))

        return Drafting()


def step_overhead(model: LanguageModel, context: int = 128) -> list[dict[str, float]]:
    """A whole verification step against the same module's bare forward of its tokens.

    Both run the same modules; the bare forward has transformers' own cache and mask.
    """
    ids = [7 + i % 900 for i in range(context)]
    found = []
    for rows in STEP_ROWS:
        controls = Controls(max_new_tokens=rows + 2 * ROUNDS)
        done = Engine(model).generate(Wrong(rows), ids, controls)
        whole = [s for s in done.stats.steps if s.proposed == rows - 1]
        steps = [1e3 * (s.seconds_target + s.seconds_rest) for s in whole]
        bares = bare_forward(model, ids, rows, len(whole))
        found.append(
            {
                "rows": rows,
                "step_ms": median(steps),
                "bare_ms": median(bares),
                "ratio": median(steps) / median(bares),
            }
        )
    return found


@torch.inference_mode()
def bare_forward(
    model: LanguageModel, ids: Sequence[int], rows: int, count: int
) -> list[float]:
    """Milliseconds of ``count`` forwards of ``rows`` tokens behind ``ids``."""
    cache = DynamicCache(config=model.config)
    model.model(input_ids=torch.tensor([list(ids)]), past_key_values=cache)
    tokens = torch.tensor([[5] * rows])
    times = []
    for _ in range(count + 1):
        started = perf_counter()
        model.model(input_ids=tokens, past_key_values=cache)
        times.append(1e3 * (perf_counter() - started))
        cache.crop(-rows)
    return times[1:]


def latency_curve(model: LanguageModel, context: int = 128) -> dict[int, float]:
    """Milliseconds of a verification forward by its number of tokens."""
    cache = model.new_cache(context + max(FORWARD_ROWS))
    model.prefill([7 + i % 900 for i in range(context)], cache)
    times: dict[int, list[float]] = {rows: [] for rows in FORWARD_ROWS}
    for turn in range(ROUNDS + 1):
        for rows in FORWARD_ROWS:
            tree = TokenTree.chain(5, [9] * (rows - 1))
            started = perf_counter()
            model.verify(tree, cache)
            if turn:
                times[rows].append(1e3 * (perf_counter() - started))
            cache.truncate(context)
    return {rows: median(found) for rows, found in times.items()}


def drafting_times(model: LanguageModel, host: Host) -> list[dict[str, Any]]:
    """Milliseconds a step of the drafters that need no model, by context length."""
    from adaptspec.decoding.controls import Processors
    from adaptspec.decoding.sampling import Sampler

    found = []
    for name, cls in sorted(host.strategies.items()):
        if cls.needs_draft or name == PLAIN:
            continue
        for length in CONTEXTS:
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(9, 400, (length,), generator=generator).tolist()
            sampler = Sampler(Processors(Controls(), length, model.device), 0)
            target = Target(model, None, None, ids, sampler, True, perf_counter)
            drafter = cls().start(target)
            drafter.propose(Context(ids, 100, 64, 0))  # indexes the prompt
            times = []
            for step in range(200):
                ids.append(ids[step])
                started = perf_counter()
                drafter.propose(Context(ids, 100, 64, step))
                times.append(1e3 * (perf_counter() - started))
            found.append({"strategy": name, "context": length, "ms": median(times)})
    return found


def selection_time(model: LanguageModel) -> float:
    """Milliseconds to choose among a thousand profiles."""
    from adaptspec.testing.stores import example_profile

    here = environment_of(model, None)
    profiles = [
        example_profile(environment=here, prompt_class=f"c{i % 10}", strategy=f"s{i}")
        for i in range(1000)
    ]
    times = []
    for _ in range(50):
        started = perf_counter()
        select(profiles, here, "c3")
        times.append(1e3 * (perf_counter() - started))
    return median(times)


MEMORY = """
import resource, sys, torch
kind, path, dtype = sys.argv[1:]
ids = [7 + i % 900 for i in range(256)]
if kind == "ours":
    from adaptspec.decoding.controls import Controls
    from adaptspec.decoding.engine import Engine
    from adaptspec.host import Host
    from adaptspec.models import load_model
    model = load_model(path, dtype=dtype)
    cls = Host.installed().strategy("prompt_lookup")
    Engine(model).generate(cls(), ids, Controls.greedy(32))
else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
try:  # ru_maxrss survives exec on Linux: it would report the parent's size
    status = open("/proc/self/status").read()
    print(int(status.split("VmHWM:")[1].split()[0]))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(path: str, dtype: str) -> dict[str, float]:
    """Peak resident MiB of a process that loads and decodes: ours, and generate."""
    found = {}
    for kind in ("ours", "generate"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, kind, path, dtype],
            capture_output=True,
            text=True,
            check=True,
        )
        scale = 1024 if sys.platform != "darwin" else 1024 * 1024
        found[kind] = int(done.stdout.split()[-1]) / scale
    return {**found, "ratio": found["ours"] / found["generate"]}


def help_seconds() -> float:
    """Median seconds of ``adaptspec --help``."""
    times = []
    for _ in range(5):
        started = perf_counter()
        subprocess.run(
            [sys.executable, "-m", "adaptspec", "--help"],
            capture_output=True,
            check=True,
        )
        times.append(perf_counter() - started)
    return median(times)


def machine(model: LanguageModel, draft: LanguageModel | None) -> dict[str, Any]:
    """What the figures hold for."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text()
    return {
        **asdict(environment_of(model, draft)),
        "instructions": [
            name
            for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
            if f" {name}" in flags
        ],
        "platform": platform.platform(),
        "linear": model.linear.kind,
        "capability": model.capability.level,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def parse_params(values: Sequence[str]) -> dict[str, dict[str, str]]:
    """``strategy.name=value`` to strategy -> name -> value."""
    found: dict[str, dict[str, str]] = {}
    for value in values:
        left, equals, right = value.partition("=")
        strategy, dot, name = left.partition(".")
        if not (equals and dot and name):
            raise click.BadParameter(
                f"strategy.name=value expected, got {value!r}", param_hint="--params"
            )
        found.setdefault(strategy, {})[name] = right
    return found


def chosen_prompts(
    workload: Workload, model: LanguageModel, per_class: int, length: int
) -> list[tuple[str, str, list[int], int]]:
    """The first ``per_class`` prompts of each class, encoded."""
    return [
        (p.id, p.prompt_class, model.encode(p.content), p.max_new_tokens or length)
        for prompts in workload.by_class().values()
        for p in prompts[:per_class]
    ]


@click.command()
@click.option("-m", "--model", "model_path", required=True, help="Model folder.")
@click.option("--draft-model", "draft_path", help="Draft model folder.")
@click.option("--workload", type=click.Path(exists=True, dir_okay=False))
@click.option("--per-class", default=2, show_default=True, help="Prompts per class.")
@click.option("-n", "--max-new-tokens", default=64, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--strategies", help="Only these of ours, separated by commas.")
@click.option("--params", multiple=True, metavar="STRATEGY.NAME=VALUE")
@click.option("--vllm-python", help="A Python that has vLLM: adds it as a contender.")
@click.option(
    "--vllm-method",
    multiple=True,
    type=click.Choice(["plain", "ngram", "draft_model"]),
    default=["plain"],
    show_default=True,
)
@click.option("--no-parts", is_flag=True, help="Leave the timings of parts out.")
@click.option("--json", "output", type=click.Path(dir_okay=False), help="Write JSON.")
def main(
    model_path: str,
    draft_path: str | None,
    workload: str | None,
    per_class: int,
    max_new_tokens: int,
    dtype: str,
    strategies: str | None,
    params: tuple[str, ...],
    vllm_python: str | None,
    vllm_method: tuple[str, ...],
    no_parts: bool,
    output: str | None,
) -> None:
    """Measure our decoding against Hugging Face's, and the parts it is made of."""
    console, progress = Console(), Console(stderr=True)
    settings = parse_params(params)
    prompts_file = read_workload(Path(workload)) if workload else example_workload()
    host = Host.installed()
    model = load_model(model_path, dtype=dtype)
    draft = load_model(draft_path, dtype=dtype) if draft_path else None
    untouched = load_model(model_path, dtype=dtype, accelerate=False)
    plain_draft = (
        load_model(draft_path, dtype=dtype, accelerate=False) if draft_path else None
    )
    engine = Engine(model, draft)
    contenders: dict[str, Contender] = {}
    for name, baseline in sorted(host.baselines.items()):
        if baseline.unavailable(untouched, plain_draft) is None:
            contenders[name] = theirs(
                untouched, plain_draft, host, name, settings.get(name, {})
            )
    wanted = strategies.split(",") if strategies else sorted(host.strategies)
    for name in dict.fromkeys([PLAIN, *wanted]):
        if host.strategy(name).unavailable(model, draft) is None:
            contenders[name] = ours(engine, host, name, settings.get(name, {}))
    peers: dict[str, Peer] = {}
    if vllm_python:
        for method in vllm_method:
            peers[f"vllm_{method}"] = Peer(
                vllm_python, model_path, draft_path or "", method
            )
    contenders.update(peers)
    prompts = chosen_prompts(prompts_file, model, per_class, max_new_tokens)
    runs = decode_all(contenders, prompts, progress.print)
    for peer in peers.values():
        peer.close()
    ties = explained(model, runs, {p[0]: p[2] for p in prompts})
    rows = summarise(runs, HF, ties)
    result: dict[str, Any] = {
        "machine": machine(model, draft),
        "workload": prompts_file.name,
        "params": settings,
        "table": rows,
        "runs": [asdict(replace(r, tokens=[])) for r in runs],
    }
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
    if not no_parts:
        progress.print("parts: steps, forwards, drafting, choosing, memory, help")
        result["verify_step"] = step_overhead(model)
        result["forward_ms"] = latency_curve(model)
        result["forward_ms_unaccelerated"] = latency_curve(untouched)
        result["drafting"] = drafting_times(model, host)
        result["choosing_ms"] = selection_time(model)
        result["help_s"] = help_seconds()
        result["peak_memory_mib"] = peak_memory(model_path, dtype)
    show(console, result)
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")


def show(console: Console, result: Mapping[str, Any]) -> None:
    """The tables."""
    where = result["machine"]
    console.print(
        f"{where['model_name']} {where['dtype']}, draft {where['draft_name']}, "
        f"{where['device_name']} ({', '.join(where['instructions'])}), "
        f"{where['threads']} threads, torch {where['versions']['torch']}, "
        f"transformers {where['versions']['transformers']}; Linear: {where['linear']}",
        markup=False,
    )
    table = Table(title=f"Decoding, {result['workload']}", title_justify="left")
    for column in ("class", "contender", "ms/token", "x generate", "tokens/forward"):
        table.add_column(column)
    table.add_column("identical to our plain")
    for row in result["table"]:
        low, middle, high = row["times_hf"]
        ms = row["ms_per_token"]
        per = row["tokens_per_forward"]
        ties = f" (+{row['near_ties']} near-ties)" if row["near_ties"] else ""
        table.add_row(
            row["class"],
            row["contender"],
            f"{ms[1]:.1f} [{ms[0]:.1f}-{ms[2]:.1f}]",
            f"{middle:.2f} [{low:.2f}-{high:.2f}]",
            f"{per:.2f}" if per else "-",
            f"{row['identical']}/{row['prompts']}{ties}",
        )
    console.print(table)
    for step in result.get("verify_step", ()):
        console.print(
            f"verify step of {step['rows']} tokens: {step['step_ms']:.1f} ms, bare "
            f"forward {step['bare_ms']:.1f} ms, ratio {step['ratio']:.3f}"
        )
    for kind in ("forward_ms", "forward_ms_unaccelerated"):
        if kind in result:
            curve = ", ".join(f"{k}: {v:.0f}" for k, v in result[kind].items())
            console.print(f"{kind.replace('_', ' ')} by tokens: {curve}")
    for item in result.get("drafting", ()):
        console.print(
            f"drafting, {item['strategy']} at {item['context']} tokens: "
            f"{item['ms']:.3f} ms a step"
        )
    if "choosing_ms" in result:
        memory = result["peak_memory_mib"]
        console.print(f"choosing among 1000 profiles: {result['choosing_ms']:.3f} ms")
        console.print(f"adaptspec --help: {result['help_s']:.2f} s")
        console.print(
            f"peak memory: ours {memory['ours']:.0f} MiB, generate "
            f"{memory['generate']:.0f} MiB, ratio {memory['ratio']:.3f}"
        )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    console.print(f"(this process peaked at {own / 1024:.0f} MiB)")


if __name__ == "__main__":
    main()
