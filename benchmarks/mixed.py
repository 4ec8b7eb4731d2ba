"""The automatic choice on mixed requests, against every fixed setting.

    python benchmarks/mixed.py --workload W [--model M] [--draft-model D] [--db FILE]

Prompts are the six classes of Spec-Bench and code edits: of each class some to tune on,
and others to test on, which come in random order and without their class. Without
``--db``, or where the database holds no tune of these prompts, they are tuned on first.
Then each prompt is decoded greedily, in turns step by step on one shared answer, by

* plain decoding,
* the automatic choice: `adaptspec.load` as it is, which tells the class from the text,
  chooses, and learns from what the requests take, beginning with what was tuned,
* of each strategy the one setting that was best over all classes of the tune,
* each setting that the tune chose for a class.

Fixed settings keep what they learn from prompt to prompt, too. Times are of whole
answers, of the prompt and for the automatic choice of choosing. A ratio is the
geometric mean over prompts, paired, with its standard error. The best fixed setting and
each class's best (*oracle*) are known only afterwards, by the times that they are
compared on, which flatters them: of many settings the best was lucky, too. So a second
oracle takes for each prompt what was best on its class's other prompts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from adaptspec.choosing.learning import Learning
from adaptspec.decoder import Decoder
from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Generation, Run
from adaptspec.default_model import default_model_path
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.params import Scalar
from adaptspec.profile import EVERY_CLASS, PLAIN, Profile, ProfileStore
from adaptspec.strategy import Strategy
from adaptspec.streaming.stream import Stream
from adaptspec.workloads import Prompt, Workload, example_workload, read_workload
from adaptspec_profiles import open_store
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.measuring.in_turns import SharedAnswer, decode_in_turns
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Setting
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.tune import tune
from contenders import exhaust

EDITS = Path(__file__).with_name("code_edits.jsonl")
EDIT = "code_edit"
AUTOMATIC = "automatic choice"
HYBRID = "hybrid"


def halves(
    workload: Workload, model: LanguageModel, tuned: int, tested: int, longest: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Of each class some prompts to tune on, and others to test on.

    Every class's prompts are shuffled, always in the same way.
    """
    first, second = [], []
    for name, prompts in workload.by_class().items():
        short = [p for p in prompts if len(p.encode(model)) <= longest]
        short = Random(name).sample(short, len(short))
        if len(short) < tuned + 1:
            raise click.ClickException(
                f"class {name} must have {tuned + 1} prompts of at most {longest} "
                f"tokens, has {len(short)}; lower --tune-per-class"
            )
        first += short[:tuned]
        second += short[tuned : tuned + tested]
    return first, second


def mixed_workload(spec_bench: Path) -> Workload:
    """Spec-Bench's classes and the code edits of the examples and of this folder."""
    edits = [p for p in example_workload().prompts if p.prompt_class == EDIT]
    more = read_workload(EDITS).prompts
    prompts = [*read_workload(spec_bench).prompts, *edits, *more]
    return Workload("mixed", tuple(replace(p, max_new_tokens=None) for p in prompts))


def fixed_settings(
    profiles: Sequence[Profile], host: Host, model: LanguageModel, draft: Any
) -> dict[str, Setting]:
    """Label -> setting: each strategy's best over all classes, then classes' winners.

    Of a strategy that the tune measured nowhere, the default.
    """
    found: dict[str, Setting] = {}
    for name, cls in host.strategies.items():
        if name == PLAIN or not cls.lossless or cls.unavailable(model, draft):
            continue
        own = [
            p
            for p in profiles
            if (p.strategy, p.prompt_class) == (name, EVERY_CLASS) and not p.baseline
        ]
        best = max(own, key=lambda p: p.measurement.ratio, default=None)
        params: Mapping[str, Scalar] = {} if best is None else best.params
        label = name if best is not None else f"{name} (default)"
        found[label] = Setting(name, cls.Params.parse(params, name).model_dump())
    return found


def winners(decoder: Decoder, host: Host, classes: Iterable[str]) -> dict[str, Setting]:
    """Label -> setting that was chosen for a class."""
    found: dict[str, Setting] = {}
    for name in classes:
        choice = decoder.choose(name)
        cls = host.strategy(choice.strategy)
        params = cls.Params.parse(choice.params, choice.strategy).model_dump()
        if choice.strategy != PLAIN:
            found[f"{choice.strategy} ({name}'s)"] = Setting(choice.strategy, params)
    return found


class Fixed:
    """Decodes with one setting, which remembers earlier prompts."""

    def __init__(
        self, model: LanguageModel, draft: LanguageModel | None, strategy: Strategy
    ) -> None:
        self._engine, self._strategy = Engine(model, draft), strategy

    def begin(
        self, prompt: Prompt, new: int, follow: Callable[[int, int], int] | None
    ) -> Run:
        """A generation to iterate over."""
        model = self._engine.model
        controls = Controls.for_model(model, temperature=0, max_new_tokens=new)
        ids = prompt.encode(model)
        return Run(self._engine, self._strategy, ids, controls, follow)


@dataclass
class Request:
    """One of the automatic choice, iterated over like a run."""

    stream: Stream

    def __iter__(self) -> Generator[list[int], None, None]:
        try:
            yield from self.stream._steps
        finally:
            self.stream.close()

    @property
    def result(self) -> Generation:
        """What was generated so far."""
        found = self.stream.result
        return Generation(found.token_ids, found.stats, found.finish, found.seed)


@dataclass
class Automatic:
    """Decodes with what a decoder chooses; its time for choosing is told apart.

    Attributes:
        seconds: What telling the class, choosing and learning took of this thread's
            processor time.
        chosen: Of each prompt: class, strategy, reason.
    """

    decoder: Decoder
    seconds: float = 0.0
    chosen: list[tuple[str | None, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._time(self.decoder, "_tell")
        self._time(self.decoder, "_chosen")
        if self.decoder._chooser is None:
            raise click.ClickException(
                "the choice must learn; the database has no uses"
            )
        self._time(self.decoder._chooser, "add")

    def _time(self, owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return work(*args, **named)
            finally:
                self.seconds += time.thread_time() - started

        setattr(owner, name, timed)

    def begin(
        self, prompt: Prompt, new: int, follow: Callable[[int, int], int] | None
    ) -> Request:
        """A generation to iterate over."""
        stream = self.decoder.stream(
            prompt.content, raw=prompt.raw, temperature=0, max_new_tokens=new
        )
        assert stream._run is not None
        stream._run._follow = follow
        choice = stream.choice
        self.chosen.append((choice.prompt_class, choice.strategy, choice.reason))
        return Request(stream)


# Prompt id -> contender -> seconds of the answer.
Times = dict[str, dict[str, float]]


def compared(
    times: Times, one: str, other: str, prompts: Sequence[str]
) -> tuple[float, float]:
    """How many times as fast ``one`` is as ``other``, and the ratio's error."""
    logs = [math.log(times[p][other] / times[p][one]) for p in prompts]
    error = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    ratio = math.exp(mean(logs))
    return ratio, ratio * error


def best(times: Times, names: Sequence[str], prompts: Sequence[str]) -> str:
    """The fastest of these over the prompts."""
    return max(names, key=lambda name: compared(times, name, PLAIN, prompts)[0])


def over_classes(logs: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """The ratio over classes in equal parts with its error, from log ratios."""
    whole = math.exp(mean(logs))
    return whole, whole * math.sqrt(sum(e * e for e in errors)) / len(errors)


def against_oracle(
    times: Times, groups: Mapping[str, Sequence[str]], names: Sequence[str]
) -> tuple[float, float]:
    """The automatic choice over each class's best, classes in equal parts."""
    logs, errors = [], []
    for prompts in groups.values():
        ratio, error = compared(times, AUTOMATIC, best(times, names, prompts), prompts)
        logs.append(math.log(ratio))
        errors.append(error / ratio)
    return over_classes(logs, errors)


def against_oracle_of_others(
    times: Times, groups: Mapping[str, Sequence[str]], names: Sequence[str]
) -> tuple[float, float] | None:
    """The same, where a prompt's best setting is that of its class's other prompts.

    Classes of one prompt are left out; None where no others are left.
    """
    logs, errors = [], []
    for prompts in groups.values():
        if len(prompts) < 2:
            continue
        found = []
        for prompt in prompts:
            others = [p for p in prompts if p != prompt]
            picked = times[prompt][best(times, names, others)]
            found.append(math.log(picked / times[prompt][AUTOMATIC]))
        logs.append(mean(found))
        errors.append(stdev(found) / math.sqrt(len(found)))
    if not logs:
        return None
    return over_classes(logs, errors)


def shown(ratio: tuple[float, float]) -> str:
    """A ratio with its error."""
    return f"{ratio[0]:.3f} ± {ratio[1]:.3f}"


def table(times: Times, groups: Mapping[str, Sequence[str]]) -> Table:
    """Ratios to plain decoding, a row for each contender, a column for each class."""
    every = [p for prompts in groups.values() for p in prompts]
    names = list(times[every[0]])
    made = Table(title="Times as fast as plain decoding", title_justify="left")
    for column in ("", *groups, "all"):
        made.add_column(column)
    for name in names:
        cells = [
            shown(compared(times, name, PLAIN, prompts))
            for prompts in [*groups.values(), every]
        ]
        made.add_row(name, *cells)
    return made


def bars(
    times: Times, groups: Mapping[str, Sequence[str]], strategies: Mapping[str, str]
) -> list[str]:
    """What must be reached, and what is.

    Args:
        strategies: Contender -> its strategy.
    """
    every = [p for prompts in groups.values() for p in prompts]
    fixed = list(strategies)
    single = [name for name in fixed if strategies[name] not in (PLAIN, HYBRID)]
    first = best(times, single, every)
    oracle = against_oracle(times, groups, fixed)
    ratios = {
        name: compared(times, AUTOMATIC, PLAIN, of) for name, of in groups.items()
    }
    worst = min(ratios, key=lambda name: ratios[name][0])
    over = best(times, fixed, every)
    fair = against_oracle_of_others(times, groups, fixed)
    told = "no class has two prompts" if fair is None else shown(fair)
    return [
        f"over the best fixed setting but the hybrid's, {first} (1.15 or more): "
        f"{shown(compared(times, AUTOMATIC, first, every))}",
        f"over the best fixed setting, {over}: "
        f"{shown(compared(times, AUTOMATIC, over, every))}",
        f"of the oracle of classes (0.97 or more): {shown(oracle)}",
        f"of the oracle of each class's other prompts: {told}",
        f"worst class over plain decoding, {worst} (0.98 or more): "
        f"{shown(ratios[worst])}",
    ]


def tuned_on(
    prompts: Sequence[Prompt],
    model: LanguageModel,
    draft: LanguageModel | None,
    store: ProfileStore,
    host: Host,
    options: TuneOptions,
) -> list[Profile]:
    """Profiles of the tune of these prompts; tunes where the store has none."""
    given = Workload("mixed, tuning half", tuple(prompts))

    def known() -> list[Profile]:
        found = store.profiles(model=model.digest)
        run = next((p.run for p in found if p.workload == given.digest), None)
        return [p for p in found if p.run == run]

    if found := known():
        return found
    result = tune(model, draft, given, options, db=store, host=host)
    for one in result.classes:
        click.echo(f"{one.name}: {one.choice.reason}", err=True)
    return known()


def decoded(
    prompts: Sequence[Prompt],
    contenders: Mapping[str, Fixed | Automatic],
    automatic: Automatic,
    new: int,
    in_time: Callable[[], bool],
) -> Iterator[tuple[Prompt, dict[str, float]]]:
    """Each prompt with what each contender took, in turns; who begins rotates."""
    names, numbers = list(contenders), itertools.count()
    for place, prompt in enumerate(prompts):
        if not in_time():
            click.echo(f"stopped after {place} of {len(prompts)} prompts", err=True)
            return
        click.echo(f"{place + 1} of {len(prompts)}: {prompt.prompt_class}", err=True)
        turn, answer = place % len(names), SharedAnswer()
        before = automatic.seconds
        begin = {
            name: partial(contenders[name].begin, prompt, new, answer.follow(name))
            for name in names[turn:] + names[:turn]
        }
        done = decode_in_turns(begin, numbers=numbers)
        found = {}
        for name in names:
            if (error := done[name].error) is not None:
                raise click.ClickException(f"{name} on {prompt.id}: {error}")
            stats = done[name].result.stats
            found[name] = stats.seconds_prefill + stats.seconds_decode
        found[AUTOMATIC] += automatic.seconds - before
        yield prompt, found


@click.command()
@click.option("-m", "--model", "model_path", help="Default: the embedded model.")
@click.option("--draft-model", "draft_path", help="Draft model folder.")
@click.option(
    "--workload",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Spec-Bench as JSON lines.",
)
@click.option("--db", help="Database with the tune; written if it has none yet.")
@click.option("--budget", default=480.0, show_default=True, help="Seconds of the tune.")
@click.option("--tune-per-class", default=8, show_default=True, help="Prompts.")
@click.option("--per-class", default=5, show_default=True, help="Prompts tested.")
@click.option("--max-prompt-tokens", default=900, show_default=True)
@click.option("-n", "--max-new-tokens", default=64, show_default=True)
@click.option("--most-seconds", default=780.0, show_default=True, help="Of the test.")
@click.option("--threads", type=int, help="Threads of torch.")
@click.option("--seed", default=0, show_default=True, help="Of the order; of draws.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write JSON.")
def main(
    model_path: str | None,
    draft_path: str | None,
    workload: Path,
    db: str | None,
    budget: float,
    tune_per_class: int,
    per_class: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    most_seconds: float,
    threads: int | None,
    seed: int,
    output: Path | None,
) -> None:
    """Tune, decode mixed prompts in turns, print ratios and bars."""
    console = Console(width=180)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    host = Host.installed()
    at = model_path or str(default_model_path(lambda line: click.echo(line, err=True)))
    model = load_model(at)
    draft = load_model(draft_path) if draft_path else None
    tuning, testing = halves(
        *(mixed_workload(workload), model, tune_per_class, per_class),
        max_prompt_tokens,
    )
    store: ProfileStore = MemoryStore() if db is None else open_store(db)
    options = TuneOptions(budget=budget, max_new_tokens=max_new_tokens)
    profiles = tuned_on(tuning, model, draft, store, host, options)
    nowhere = nullcontext(MemoryStore())  # what requests take isn't written
    run = profiles[0].run
    frozen = Decoder(model, draft, store, host, record=False, run=run, adapt=False)
    adapting = Decoder(
        *(model, draft, store, host),
        opens=lambda: nowhere,
        run=run,
        adapt=Learning(seed=seed),
    )
    settings = {PLAIN: PLAIN_SETTING}
    settings |= fixed_settings(profiles, host, model, draft)
    chosen = winners(frozen, host, dict.fromkeys(p.prompt_class for p in testing))
    for label, setting in chosen.items():
        if setting.key not in {known.key for known in settings.values()}:
            settings[label] = setting
    automatic = Automatic(adapting)
    contenders: dict[str, Fixed | Automatic] = {}
    for label, setting in settings.items():
        # A first generation is slow: it is one of a strategy that is then forgotten.
        for one in (tuning[0], None):
            fixed = Fixed(model, draft, host.create(setting.strategy, setting.params))
            if one is not None:
                exhaust(fixed.begin(one, 8, None))
        contenders[label] = fixed
    contenders[AUTOMATIC] = automatic
    Random(seed).shuffle(testing)
    times: Times = {}
    groups: dict[str, list[str]] = {}
    end = time.monotonic() + most_seconds
    for prompt, found in decoded(
        *(testing, contenders, automatic, max_new_tokens),
        in_time=lambda: time.monotonic() < end,
    ):
        times[prompt.id] = found
        groups.setdefault(prompt.prompt_class, []).append(prompt.id)
        if output is not None:
            part = output.with_name(output.name + ".part")
            kept = {"times": times, "groups": groups, "chosen": automatic.chosen}
            part.write_text(json.dumps(kept, indent=1) + "\n")
            os.replace(part, output)
    if not times:
        raise click.ClickException("no prompt was decoded; raise --most-seconds")
    strategies = {label: setting.strategy for label, setting in settings.items()}
    console.print(table(times, groups))
    for line in bars(times, groups, strategies):
        console.print(line, markup=False)
    whole = sum(found[AUTOMATIC] for found in times.values())
    console.print(f"choosing and learning: {automatic.seconds / whole:.3%} of the time")
    for name, (told, strategy, reason) in zip(times, automatic.chosen, strict=True):
        click.echo(f"{name}: {told}, {strategy}: {reason}", err=True)


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
