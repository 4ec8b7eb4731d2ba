"""Times the parts of a step: verification, forwards, drafting, choosing, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache

from adaptspec.acceleration.argmax import argmax_rows
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.environment import environment_of
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.selector import select
from adaptspec.strategy import Context, Drafter, Outcome, Strategy, Target
from adaptspec.testing.stores import example_choice
from adaptspec.token_tree import TokenTree
from contenders import PLAIN
from tables import spread

PARTS = ("verify", "curve", "drafting", "choosing", "memory", "help")
FORWARD_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 64)
STEP_ROWS = (1, 4, 8, 16)
CONTEXTS = (1024, 4096, 16384)
TIMED_ROUNDS = 9
TIMED_STEPS = 200


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


def verify_steps(model: LanguageModel, context: int = 128) -> list[dict[str, Any]]:
    """A whole verification step beside the same module's bare forward of its tokens.

    They take turns: one step of the engine, one bare forward with transformers' own
    cache and mask behind as many tokens.
    """
    ids = filler(context, model.vocab_size)
    found = []
    for rows in STEP_ROWS:
        controls = Controls(max_new_tokens=rows + TIMED_ROUNDS + 2)
        run = Run(Engine(model, guard=False), Wrong(rows), ids, controls)
        steps = iter(run)
        next(steps)  # the prefill
        cache = DynamicCache(config=model.config)
        bare_forward(model, ids, cache)
        ratios, whole, bare = [], [], []
        for turn in range(TIMED_ROUNDS + 1):
            next(steps)
            took = run.result.stats.steps[-1]
            started = perf_counter()
            bare_forward(model, [5] * rows, cache)
            seconds = perf_counter() - started
            cache.crop(-(rows - 1) or 0)  # the step kept one token, too
            if turn:
                whole.append(1e3 * (took.seconds_target + took.seconds_rest))
                bare.append(1e3 * seconds)
                ratios.append(whole[-1] / bare[-1])
        found.append(
            {
                "rows": rows,
                "step_ms": median(whole),
                "bare_ms": median(bare),
                "ratio": spread(ratios),
            }
        )
    return found


@torch.inference_mode()
def bare_forward(model: LanguageModel, ids: Sequence[int], cache: DynamicCache) -> None:
    """The module's own forward, logits of all rows as a verification needs them."""
    keep: dict[str, Any] = {"logits_to_keep": 1} if len(ids) > max(STEP_ROWS) else {}
    keep[model.cache_argument] = cache
    model.model(input_ids=torch.tensor([list(ids)]), **keep)


def filler(count: int, vocab_size: int) -> list[int]:
    """Tokens to attend to."""
    return [i % min(900, vocab_size) for i in range(count)]


def latency_curve(model: LanguageModel, context: int = 128) -> dict[int, float]:
    """Milliseconds of a verification forward by its number of tokens."""
    cache = model.new_cache(context + max(FORWARD_ROWS))
    model.prefill(filler(context, model.vocab_size), cache)
    times: dict[int, list[float]] = {rows: [] for rows in FORWARD_ROWS}
    for turn in range(TIMED_ROUNDS + 1):
        for rows in FORWARD_ROWS:
            tree = TokenTree.chain(5, [9] * (rows - 1))
            started = perf_counter()
            model.forward_tree(tree, cache)
            if turn:
                times[rows].append(1e3 * (perf_counter() - started))
            cache.truncate(context)
    return {rows: median(found) for rows, found in times.items()}


def drafting_times(model: LanguageModel, host: Host) -> list[dict[str, Any]]:
    """Milliseconds a step of the drafters without a model, by context length.

    The text repeats itself with changes, as prompts with something to copy do. A step
    is a proposal and, with logits made up, what the drafter learns from its outcome.
    """
    found = []
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((65, model.vocab_size), generator=generator).to(model.dtype)
    for name, cls in sorted(host.strategies.items()):
        requires = cls.requires
        # Drafts that are forward passes aren't timed here; hidden states are made up.
        if name == PLAIN or requires.draft is not None or requires.heads is not None:
            continue
        for length in CONTEXTS:
            text = repeating_text(length + TIMED_STEPS, model.vocab_size)
            ids = text[:length]
            sampler = Sampler(Processors(Controls(), length, model.device), 0)
            target = Target(model, None, None, tuple(ids), sampler, True, perf_counter)
            drafter = host.create(name, {}).start(target)
            started = perf_counter()
            rows = {length - 64 + row: row for row in range(64)}
            drafter.observe(Outcome(None, (), ids[-1:], rows, logits[:64]))
            drafter.propose(Context(ids, 100, 64, 0))
            first = perf_counter() - started
            times = []
            for step in range(TIMED_STEPS):
                ids.append(text[length + step])
                started = perf_counter()
                tree = drafter.propose(Context(ids, 100, 64, step))
                proposed = perf_counter() - started
                kept = [n for n in range(len(tree)) if n not in tree.unread]
                rows = {node: row for row, node in enumerate(kept)}
                coming = text[length + step + 1 : length + step + 2] or [0]
                seen = logits[: len(kept)]
                best = argmax_rows(seen)  # the engine's own work
                outcome = Outcome(tree, [0], coming, rows, seen, {}, best)
                started = perf_counter()
                drafter.observe(outcome)
                times.append(1e3 * (proposed + perf_counter() - started))
            found.append(
                {
                    "strategy": name,
                    "context": length,
                    "ms": spread(times),
                    "first_ms": 1e3 * first,
                }
            )
    return found


def repeating_text(length: int, vocab_size: int) -> list[int]:
    """Passages that come again, one token in twelve changed."""
    generator = torch.Generator().manual_seed(length)

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    text = [draw(min(400, vocab_size)) for _ in range(64)]
    while len(text) < length:
        start = draw(len(text) - 40)
        passage = text[start : start + 40]
        text += [t if draw(12) else draw(min(400, vocab_size)) for t in passage]
    return text[:length]


def selection_time(model: LanguageModel) -> float:
    """Milliseconds to choose among a thousand tunes' choices."""
    here = environment_of(model, None)
    choices = [
        example_choice(environment=here, prompt_class=f"c{i % 10}", run=f"r{i}")
        for i in range(1000)
    ]
    times = []
    for _ in range(50):
        started = perf_counter()
        select(choices, here, "c3")
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
    from adaptspec.model.loading import load_model
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


def measure_parts(
    parts: Sequence[str],
    model: LanguageModel,
    untouched: LanguageModel,
    host: Host,
    path: str,
    dtype: str,
) -> dict[str, Any]:
    """The wanted ones."""
    found: dict[str, Any] = {}
    if "verify" in parts:
        found["verify_step"] = verify_steps(model)
    if "curve" in parts:
        found["forward_ms"] = latency_curve(model)
        found["forward_ms_unaccelerated"] = latency_curve(untouched)
    if "drafting" in parts:
        found["drafting"] = drafting_times(model, host)
    if "choosing" in parts:
        found["choosing_ms"] = selection_time(model)
    if "help" in parts:
        found["help_s"] = help_seconds()
    if "memory" in parts:
        found["peak_memory_mib"] = peak_memory(path, dtype)
    return found


def show_parts(console: Console, found: Mapping[str, Any]) -> None:
    """A line each."""
    for step in found.get("verify_step", ()):
        low, middle, high = step["ratio"]
        console.print(
            f"verify step of {step['rows']} tokens: {step['step_ms']:.1f} ms, bare "
            f"forward {step['bare_ms']:.1f} ms, ratio {middle:.3f} "
            f"[{low:.3f}-{high:.3f}]",
            markup=False,
        )
    for kind in ("forward_ms", "forward_ms_unaccelerated"):
        if kind in found:
            curve = ", ".join(f"{k}: {v:.0f}" for k, v in found[kind].items())
            console.print(f"{kind.replace('_', ' ')} by tokens: {curve}")
    for item in found.get("drafting", ()):
        low, middle, high = item["ms"]
        console.print(
            f"drafting, {item['strategy']} at {item['context']} tokens: {middle:.3f} "
            f"[{low:.3f}-{high:.3f}] ms a step, {item['first_ms']:.1f} ms the first",
            markup=False,
        )
    if "choosing_ms" in found:
        console.print(f"choosing among 1000 profiles: {found['choosing_ms']:.3f} ms")
    if "help_s" in found:
        console.print(f"adaptspec --help: {found['help_s']:.2f} s")
    if "peak_memory_mib" in found:
        memory = found["peak_memory_mib"]
        console.print(
            f"peak memory: ours {memory['ours']:.0f} MiB, generate "
            f"{memory['generate']:.0f} MiB, ratio {memory['ratio']:.3f}"
        )
