"""What is lost while the choice follows what requests take: regret, where it drifts.

    python benchmarks/bandit.py
    python benchmarks/bandit.py --model M --workload W --record FILE

The first needs no model. A class has four settings of about 1.4 times plain decoding's
speed; a tune of eight prompts gives the prior; then 400 requests come, whose ratios
differ from prompt to prompt and pause now and then. Regret is the time that is lost, as
a share of the time that is compared with: of the one setting that is best over all
requests, or plain decoding (*fixed*), and of the best one at each moment (*oracle*).
Beside it stands what is lost where what was tuned is used for ever.

The second is a real drift. The prompts of some classes come first, those of others
afterwards, and no class is told. Settings' times are replayed on recorded answers
(``benchmarks/recorded.py``); the tune has seen other prompts of the first kind only.
Orders of the prompts are drawn by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from random import Random
from statistics import mean, stdev

import click
from rich.console import Console
from rich.table import Table

from adaptspec.choosing.learning import Chooser, Finalists, Learning
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.stats import RunStats, StepStats
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.in_use import Uses
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.model.loading import load_model
from adaptspec.profile import ANSWER, Pick
from adaptspec.selector import rank
from adaptspec.strategy import union
from adaptspec.testing.stores import example_choice
from adaptspec.workloads import Prompt, read_workload
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.measuring.profiler import Recording, Setting
from adaptspec_tuner.replaying.replayer import Replayer
from classing import replayed_gains
from recorded import RECORDED_LIKELIEST, record
from run import parse_contender

# Log ratios to plain decoding of the settings: expected at a request, and what the
# request is seen to have. Plain decoding itself is left out: it has 0.
Request = tuple[Sequence[float], Sequence[float]]
FINALISTS = (
    "suffix=suffix",
    "prompt_lookup, 3=prompt_lookup:draft_length=3",
    "prompt_lookup, 10=prompt_lookup:draft_length=10",
    "token_recycling=token_recycling:draft_length=7",
    "hybrid=hybrid:use_draft=no",
)


class Drift(Enum):
    """How settings' speeds change after the tune."""

    NONE = "none"
    WRONG = "at once other than tuned"
    ABRUPT = "the best loses its gain half-way"
    LOSING = "half-way all lose, plain is best"
    GAINING = "half-way the worst becomes best"
    SLOW = "slowly to other speeds"
    UNTOLD = "none; about 1.05x, four prompts couldn't tell"


@dataclass(frozen=True)
class World:
    """Requests of one class, simulated.

    Args:
        before: Mean log ratio of each setting, as it was tuned.
        after: The same once it has drifted.
        spread: Of a request's log ratio; half of its variance all settings share.
        pauses: Share of requests that take three times as long.
    """

    drift: Drift
    requests: int
    before: Sequence[float]
    after: Sequence[float]
    spread: float = 0.25
    pauses: float = 0.02

    @classmethod
    def drawn(cls, random: Random, drift: Drift, requests: int) -> World:
        """Four settings of about 1.4 times plain decoding's speed."""
        middle, wide = (0.05, 0.06) if drift is Drift.UNTOLD else (0.35, 0.15)
        before = [random.gauss(middle, wide) for _ in range(4)]
        after = list(before)
        if drift is Drift.ABRUPT:
            after[before.index(max(before))] -= 0.5
        elif drift is Drift.LOSING:
            after = [log - 0.6 for log in before]
        elif drift is Drift.GAINING:
            after[before.index(min(before))] = max(before) + 0.2
        elif drift in (Drift.WRONG, Drift.SLOW):
            after = [random.gauss(0.35, 0.2) for _ in before]
        return cls(drift, requests, before, after)

    def tune(self, random: Random, prompts: int = 8) -> list[list[float]]:
        """Log ratios of each setting on prompts that a tune saw."""
        return [
            [random.gauss(log, self.spread) for _ in range(prompts)]
            for log in self.before
        ]

    def seen(self, random: Random) -> Iterator[Request]:
        """All requests."""
        half = self.spread / math.sqrt(2)
        for number in range(self.requests):
            logs, shared = self._logs(number), random.gauss(0, half)
            if random.random() < self.pauses:
                shared -= math.log(3)
            yield logs, [log + shared + random.gauss(0, half) for log in logs]

    def _logs(self, number: int) -> list[float]:
        done = number / self.requests
        shares = {Drift.NONE: 0.0, Drift.UNTOLD: 0.0}
        shares |= {Drift.WRONG: 1.0, Drift.SLOW: done}
        moved = shares.get(self.drift, float(done >= 0.5))
        pairs = zip(self.before, self.after, strict=True)
        return [old + moved * (new - old) for old, new in pairs]


@dataclass(frozen=True)
class Regret:
    """Time lost, as a share of the time of who knew better.

    Args:
        to_fixed: To the setting that is best over all requests.
        to_oracle: To the best setting at each moment.
        tuned_to_fixed: What the setting that was tuned as best loses, never changed.
        tuned_to_oracle: The same.
        changes: Share of requests decoded with another setting than was tuned as best.
    """

    to_fixed: float
    to_oracle: float
    tuned_to_fixed: float
    tuned_to_oracle: float
    changes: float


def finalists(
    tuned: Sequence[Sequence[float]], unsure: bool = False
) -> tuple[Finalists, list[int]]:
    """What a tune decides by log ratios of each setting; their places, best first.

    Those that aren't faster than plain decoding are no finalists.

    Args:
        unsure: Whether the tune chose plain decoding, and requests try two of them.
    """
    picks = []
    for place, logs in enumerate(tuned):
        middle, error = mean(logs), stdev(logs) / math.sqrt(len(logs))
        low, high = (math.exp(middle + sign * 2 * error) for sign in (-1, 1))
        picks.append(Pick(str(place), {}, "tuned", math.exp(middle), low, high))
    picks = sorted(
        (pick for pick in picks if pick.ratio > 1), key=lambda pick: -pick.ratio
    )
    picks = picks[:2] if unsure else picks
    decided = example_choice(picks=picks, prompts=len(tuned[0]), objective=ANSWER)
    ranking = rank([decided], decided.environment, decided.prompt_class)
    ranking = replace(ranking, unsure=unsure)
    places = [int(pick.strategy) for pick in picks]
    return Finalists(ranking, range(1, len(picks) + 2)), places


def regret(
    tuned: Sequence[Sequence[float]],
    requests: Iterator[Request],
    learning: Learning,
    tokens: int = 64,
    unsure: bool = False,
) -> Regret:
    """What is lost where a chooser decides for each request."""
    found, places = finalists(tuned, unsure)
    chooser = Chooser(Uses(lambda: nullcontext(MemoryStore())), learning)
    spent = oracle = first = 0.0
    fixed, changes, count = [0.0] * (len(tuned) + 1), 0, 0
    for logs, seen in requests:
        times = [*(math.exp(-log) for log in logs), 1.0]
        chosen = chooser.choose(found)
        place = places[chosen] if chosen < len(places) else -1
        spent += times[place]
        oracle += min(times)
        first += times[places[0] if places and not unsure else -1]
        fixed = [total + time for total, time in zip(fixed, times, strict=True)]
        changes += chosen > 0
        count += 1
        ratio = math.exp(seen[place]) if chosen < len(places) else 1.0
        chooser.add(found, chosen, stats_of(ratio, tokens))
    return Regret(
        spent / min(fixed) - 1,
        spent / oracle - 1,
        first / min(fixed) - 1,
        first / oracle - 1,
        changes / count,
    )


def stats_of(ratio: float, tokens: int = 64, plain: float = 0.02) -> RunStats:
    """Of a request that was so many times as fast as plain decoding, by the guard."""
    seconds = tokens * plain / ratio
    step = StepStats(3, 2, tokens, seconds, 0.0, 0.0)
    return RunStats(9, tokens + 1, 0.0, [step], 0, seconds * (ratio - 1), plain)


def table(title: str) -> Table:
    """With a row for each world or workload."""
    made = Table(title=title, title_justify="left")
    for column in (
        *("", "to the best fixed", "to the oracle"),
        *("never changed: to the best fixed", "to the oracle", "changed"),
    ):
        made.add_column(column)
    return made


def row(label: str, found: Sequence[Regret]) -> list[str]:
    """Means and deviations over seeds."""

    def cell(of: Callable[[Regret], float]) -> str:
        values = [100 * of(one) for one in found]
        wide = stdev(values) if len(values) > 1 else 0.0
        return f"{mean(values):.1f}% ± {wide:.1f}"

    return [
        label,
        cell(lambda one: one.to_fixed),
        cell(lambda one: one.to_oracle),
        cell(lambda one: one.tuned_to_fixed),
        cell(lambda one: one.tuned_to_oracle),
        cell(lambda one: one.changes),
    ]


def simulated(drift: Drift, requests: int, learning: Learning, seed: int) -> Regret:
    """One world of a seed."""
    random = Random(seed)
    world = World.drawn(random, drift, requests)
    unsure = drift is Drift.UNTOLD
    tuned = world.tune(random, prompts=4 if unsure else 8)
    return regret(tuned, world.seen(random), learning, unsure=unsure)


def changing(
    logs: Mapping[str, Sequence[float]],
    first: Sequence[str],
    then: Sequence[str],
    requests: int,
    learning: Learning,
    seed: int,
) -> Regret:
    """Prompts of one kind, and half-way of another.

    Args:
        logs: Prompt id -> log ratio of each setting.
        first: Ids of the first kind; half of them are tuned on.
        then: Ids of the second.
        requests: A prompt comes several times if there are fewer.
    """
    random = Random(seed)
    shuffled = random.sample(first, len(first))
    tuned, used = shuffled[::2], shuffled[1::2]
    come = [*random.choices(used, k=requests // 2)]
    come += random.choices(then, k=requests - len(come))
    settings = range(len(logs[first[0]]))
    # The oracle knows the kind, not the prompt.
    expected = [
        [mean(logs[name][one] for name in kind) for one in settings]
        for kind in (used, then)
    ]
    kinds = [expected[number >= requests // 2] for number in range(requests)]
    seen = ((kind, logs[name]) for kind, name in zip(kinds, come, strict=True))
    return regret([[logs[n][one] for n in tuned] for one in settings], seen, learning)


@click.command()
@click.option("--seeds", default=40, show_default=True)
@click.option("--requests", default=400, show_default=True, help="Of a world.")
@click.option("--memory", type=float, multiple=True, help="Of Learning.")
@click.option("--exploration", type=float, multiple=True, help="Of Learning.")
@click.option("-m", "--model", "model_path", help="Model folder, for the real drift.")
@click.option("--workload", type=click.Path(exists=True, path_type=Path))
@click.option("--record", "at", type=click.Path(path_type=Path), help="Answers.")
@click.option("--first", default="summarization,rag", show_default=True, help="Classes")
@click.option("--then", default="conversation,math_reasoning", show_default=True)
@click.option("--per-class", default=12, show_default=True, help="Prompts recorded.")
@click.option("-n", "--max-new-tokens", default=64, show_default=True)
@click.option("--max-prompt-tokens", default=900, show_default=True)
@click.option("--contender", multiple=True, metavar="LABEL=STRATEGY:NAME=VALUE,...")
def main(
    seeds: int,
    requests: int,
    memory: tuple[float, ...],
    exploration: tuple[float, ...],
    model_path: str | None,
    workload: Path | None,
    at: Path | None,
    first: str,
    then: str,
    per_class: int,
    max_new_tokens: int,
    max_prompt_tokens: int,
    contender: tuple[str, ...],
) -> None:
    """Print regrets."""
    console = Console(width=150)
    default = Learning()
    learnings = [
        (f"memory {m:g}, exploration {e:g}", Learning(m, e))
        for m in memory or (default.memory,)
        for e in exploration or (default.exploration,)
    ]
    if model_path is None:
        for label, learning in learnings:
            shown = table(f"Simulated, {requests} requests, {seeds} seeds, {label}")
            for drift in Drift:
                found = [
                    simulated(drift, requests, replace(learning, seed=seed), seed)
                    for seed in range(seeds)
                ]
                shown.add_row(*row(drift.value, found))
            console.print(shown)
        return
    if workload is None or at is None:
        raise click.UsageError("--model needs --workload and --record")
    kinds = [first.split(","), then.split(",")]
    logs, classes = recorded_logs(
        *(model_path, workload, at, [*kinds[0], *kinds[1]], per_class),
        *(max_new_tokens, max_prompt_tokens, contender or FINALISTS),
    )
    ids = [[name for name in logs if classes[name] in kind] for kind in kinds]
    for label, learning in learnings:
        shown = table(f"Real prompts, {requests} requests, {seeds} orders, {label}")
        for one, other, title in (
            (ids[0], ids[1], f"{first}, then {then}"),
            (ids[1], ids[0], f"{then}, then {first}"),
            (ids[0], ids[0], f"{first} all along"),
        ):
            found = [
                changing(logs, one, other, requests, replace(learning, seed=seed), seed)
                for seed in range(seeds)
            ]
            shown.add_row(*row(title, found))
        console.print(shown)


def recorded_logs(
    model_path: str,
    workload: Path,
    at: Path,
    wanted: Sequence[str],
    per_class: int,
    new: int,
    longest: int,
    contenders: Sequence[str],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Prompt id -> log ratio of each contender, replayed; prompt id -> class."""
    host, engine = Host.installed(), Engine(load_model(model_path))
    whole = read_workload(workload)
    some = tuple(p for p in whole.prompts if p.prompt_class in wanted)
    kept = record(engine, replace(whole, prompts=some), per_class, longest, new, at)
    answers = {k: a for k, a in kept["answers"].items() if a["class"] in wanted}
    settings = []
    for _, name, params in map(parse_contender, contenders):
        cls = host.strategy(name)
        settings.append(Setting(name, cls.Params.parse(params, name).model_dump()))
    created = [host.create(one.strategy, one.params) for one in settings]
    replayer = Replayer(
        engine,
        host,
        ForwardCosts(**kept["costs"]["target"]),
        {k: Recording(a["prompt"], a["tokens"], new) for k, a in answers.items()},
        None,
        RECORDED_LIKELIEST,
        union([one.observes(engine.model) for one in created]),
    )
    prompts = [Prompt(name, a["class"], text="") for name, a in answers.items()]
    Random(0).shuffle(prompts)
    gains = replayed_gains(replayer, settings, prompts)
    logs = {
        name: [math.log(found[one.key]) for one in settings]
        for name, found in gains.items()
    }
    return logs, {name: a["class"] for name, a in answers.items()}


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
