"""What a tune of another engine finds in its budget, simulated on a fake clock.

The world is llama.cpp with a 1.5B model in bf16 on two cores, as it was measured: 65 ms
a plain step, a row more costs 3% of it, a draft model's token 35%. Classes differ in
how easily their tokens are drafted and copied, prompts differ within a class, and each
answer's time by chance. What is chosen is compared with the best setting of a grid, on
the held-out prompts, by what is true.

    python benchmarks/engine_search.py --minutes 20 --seeds 5
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from types import SimpleNamespace
from typing import Annotated

from pydantic import Field

from adaptspec.engines.inference_engine import Method
from adaptspec.hookspecs import hookimpl
from adaptspec.host import Host
from adaptspec.params import Params, Scalar, Tunable
from adaptspec.profile import PLAIN
from adaptspec.testing.scripted_engine import Machine, engine_on, workload_of
from adaptspec.workloads import Prompt, split
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.engines.tune import tune_engine
from adaptspec_tuner.options import TuneOptions

# Class -> share of tokens that are easy to draft; share of steps in which an n-gram is
# found; how likely its tokens are right; seconds until the first token.
CLASSES: Mapping[str, tuple[float, float, float, float]] = {
    "chat": (0.25, 0.05, 0.4, 1.0),
    "translation": (0.3, 0.03, 0.3, 1.0),
    "summarization": (0.45, 0.45, 0.85, 8.0),
    "qa": (0.35, 0.08, 0.4, 1.0),
    "math": (0.7, 0.2, 0.6, 1.2),
    "rag": (0.45, 0.35, 0.8, 9.0),
    "code": (0.9, 0.2, 0.7, 1.5),
    "code_edit": (0.9, 0.6, 0.95, 4.0),
}


class DraftParams(Params):
    """Of a draft model."""

    n_max: Annotated[int, Tunable(1, 16, log=True)] = Field(default=3)
    p_min: Annotated[float, Tunable(0.0, 0.9, step=0.1)] = Field(default=0.0)


class NgramParams(Params):
    """Of n-grams."""

    size: Annotated[int, Tunable(2, 16, log=True)] = Field(default=12)
    length: Annotated[int, Tunable(4, 64, log=True)] = Field(default=48)


class BothParams(NgramParams, DraftParams):
    """Of n-grams, and a draft model where none is found."""


METHODS = [
    Method("draft", "asks a draft model", DraftParams),
    *(Method(f"ngram_{n}", "copies", NgramParams) for n in ("simple", "map", "mod")),
    Method("ngram_cache", "copies", NgramParams),
    Method("draft_ngram", "copies, or asks a draft model", BothParams),
]


class World:
    """Prompts whose easiness is drawn."""

    def __init__(self, seed: int, row: float, drafted: float) -> None:
        self._seed, self._row, self._drafted = seed, row, drafted

    def __call__(
        self, prompt: Prompt, method: str, params: Mapping[str, Scalar]
    ) -> float:
        """Plain decoding's time for a token over a method's."""
        draw = random.Random(f"{self._seed} {prompt.id}")
        easy, found, right, _ = CLASSES[prompt.prompt_class]
        easy = min(0.97, max(0.05, easy + draw.gauss(0, 0.06)))
        found = min(0.95, found * math.exp(draw.gauss(0, 0.35)))
        gained, cost = 0.0, 1.0
        if method.startswith("draft"):
            count, least = int(params["n_max"]), float(params["p_min"])
            if least < 0.35:
                chance, asked = 0.97 * easy + 0.35 * (1 - easy), float(count)
            else:  # it stops at what isn't easy
                chance = 0.97 * easy
                asked = sum(easy**depth for depth in range(count))
            gained = sum(chance**depth for depth in range(1, count + 1))
            cost += self._drafted * asked + self._row * min(asked, gained + 1)
        if "ngram" in method:
            kind = {"ngram_simple": 1.0, "ngram_map": 0.95, "ngram_mod": 0.9}
            size, length = int(params["size"]), int(params["length"])
            hit = kind.get(method, 0.85 if method == "ngram_cache" else 1.0) * found
            hit *= math.exp(-0.15 * (size - 2))
            sure = 1 - (1 - right) * math.exp(-0.15 * (size - 2))
            copied = sum(sure**depth for depth in range(1, length + 1))
            gained = hit * copied + (1 - hit) * gained
            cost = hit * (1 + self._row * length) + (1 - hit) * cost
        return (1 + gained) / cost


def grid(method: Method) -> list[dict[str, Scalar]]:
    """Every combination of up to five values of each parameter."""
    values: list[Sequence[Scalar]] = []
    for spec in method.Params.specs():
        tunable = spec.tunable
        assert tunable is not None
        low, high = float(tunable.low or 0), float(tunable.high or 0)
        steps = [n / 4 for n in range(5)]
        if tunable.log:
            found = [low * (high / low) ** step for step in steps]
        else:
            found = [low + (high - low) * step for step in steps]
        values.append([round(v) if spec.kind == "int" else v for v in found])
    names = [spec.name for spec in method.Params.specs()]
    return [dict(zip(names, each, strict=True)) for each in itertools.product(*values)]


def simulate(seed: int, minutes: float, slow: float, room: int) -> tuple[float, float]:
    """How the choices compare with the grid's best, and the lowest to plain decoding.

    Args:
        slow: How many times as dear drafts are as in bf16: 4-bit weights' plain steps
            are short beside them.
    """
    truth = World(seed, 0.03 * slow, 0.35 * slow)
    machine = Machine(
        truth,
        token=0.065 / slow,
        noise=0.02,
        methods=METHODS,
        prefill={name: of[3] for name, of in CLASSES.items()},
        room=room,
    )
    cls = engine_on(machine)
    workload = workload_of(list(CLASSES))
    plugin = SimpleNamespace(register_engines=hookimpl(lambda: [cls]))
    result = tune_engine(
        "model.gguf",
        None,
        workload,
        TuneOptions(60 * minutes, engine=cls.name, seed=seed),
        db=MemoryStore(),
        host=Host({"scripted": plugin}),
        clock=machine.clock,
    )
    _, held_out = split(workload)

    def ratio(name: str, method: str, params: Mapping[str, Scalar]) -> float:
        def seconds(prompt: Prompt, how: str) -> float:
            return sum(machine.seconds(prompt, how, params, machine.tokens))

        prompts = held_out.by_class()[name]
        return geometric_mean([seconds(p, PLAIN) / seconds(p, method) for p in prompts])

    shares, lowest = [], math.inf
    chosen = {f.name: (f.choice.strategy, f.choice.params) for f in result.named}
    for name in CLASSES:
        method, params = chosen.get(name, (PLAIN, {}))
        reached = ratio(name, method, params)
        best = max(1.0, *(ratio(name, m.name, p) for m in METHODS for p in grid(m)))
        shares.append(reached / best)
        lowest = min(lowest, reached)
        print(f"  {name:14} {method:12} {reached:5.2f}x, the grid's best {best:5.2f}x")
    parts = ", ".join(f"{part} {taken:.0f} s" for part, taken in result.spent.items())
    print(f"  {machine.clock.now:.0f} s ({parts}), {cls.opened[-1].starts} starts")
    return geometric_mean(shares), lowest


def main() -> None:
    """Simulate tunes, and print what they reach."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slow", type=float, default=1.0)
    parser.add_argument("--room", type=int, default=4)
    asked = parser.parse_args()
    found = []
    for seed in range(asked.seeds):
        found.append(simulate(seed, asked.minutes, asked.slow, asked.room))
        share, lowest = found[-1]
        print(f"seed {seed}: {share:.1%} of the grid's best, {lowest:.2f}x at least")
    share = geometric_mean([share for share, _ in found])
    print(f"over all: {share:.1%}, {min(lowest for _, lowest in found):.2f}x at least")


if __name__ == "__main__":
    main()
