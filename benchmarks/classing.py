"""How well a prompt's class is told from its text, what it takes, what errors cost.

    python benchmarks/classing.py --workload W
    python benchmarks/classing.py --workload W --model M --record FILE

The first needs no model. For 4, 8 and 20 prompts a class, drawn with several seeds, a
classifier is learnt as `adaptspec tune` learns it, and told are: the share of the other
prompts whose likeliest class is right; the share that is given a class, and how many of
those rightly; of the prompts of a class that is left out, and of prompts in other
languages and formats (``STRANGE``), the share that is given none. Then the processor
time of telling a short and a long prompt's class, as text and, with a model, as token
ids, and of all that a warm decoder does to choose.

What counts is speed, and classes often want the same setting. So with a model settings
are replayed on recorded answers, and each class gets the one that is best for its
tuning half: the second table has the geometric mean of what the other half gains where
classes are declared, told from the text, or not known at all.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import click
from rich.console import Console
from rich.table import Table

from adaptspec.classes.classifier import KEY, Classifier
from adaptspec.classes.text_features import prompt_text
from adaptspec.decoder import Decoder
from adaptspec.decoding.engine import Engine
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.strategy import Strategy
from adaptspec.testing.stores import example_profile
from adaptspec.workloads import Prompt, Workload, read_workload
from adaptspec.workloads import split as divided
from adaptspec_profiles.memory import MemoryStore
from adaptspec_tuner.classes.learn import learn
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Recording, Setting
from adaptspec_tuner.replaying.replayer import Replayer
from adaptspec_tuner.searching.space import defaults, suggest
from recorded import record

STRATEGIES = ("prompt_lookup", "suffix", "draft_model")  # the last with a draft model
COUNTS = (4, 8, 20)  # prompts a class
ONE, DECLARED, TOLD = "no class, the best of all", "declared", "told from the text"
EACH = "each prompt its best, known only afterwards"

# Of no class of the workloads here.
STRANGE = (
    "请把下面的句子翻译成英文, 今天天气很好, 我们去公园散步吧。",
    "写一首关于秋天的诗",
    "東京の観光名所を三つ教えてください。",
    "भारत की राजधानी क्या है?",
    "ما هي عاصمة فرنسا ولماذا هي مشهورة",
    "Ποια είναι η πρωτεύουσα της Αυστραλίας;",
    "Escribe una carta formal de queja a una compañía aérea por mi equipaje perdido.",
    "¿Cuál es la capital de Australia y por qué no es Sídney?",
    "Napisz krótkie podanie o urlop na przyszły tydzień, proszę.",
    'int main(int n,char**v){for(int i=0;i<n;i++)printf("%s\\n",v[i]);return 0;}',
    "SELECT u.id, COUNT(*) FROM users u JOIN orders o ON o.user_id=u.id GROUP BY u.id",
    '<html><head><title>x</title></head><body><div class="a">hi</div></body></html>',
    "aGVsbG8gd29ybGQgdGhpcyBpcyBiYXNlNjQgZW5jb2RlZCB0ZXh0IGZvciB0ZXN0aW5n",
    "|a|b|c|\n|--|--|--|\n|1|2|3|\n|4|5|6|",
    '{"a": [1, 2, {"b": null}], "c": "xyz", "d": true, "e": {"f": [1.5, 2.5]}}',
)

# Prompt id -> setting -> logarithm of the ratio to plain decoding.
Logs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Telling:
    """Shares of prompts that a classifier was not learnt from; NaN without any.

    Args:
        right: Their likeliest class is right.
        told: They are given a class.
        told_right: Of those, the right one.
        left_out: Of those of a class that is left out: they are given none.
        strange: Of ``STRANGE``: they are given none.
        promised: What cross-validation promised of ``right``.
    """

    right: float
    told: float
    told_right: float
    left_out: float
    strange: float
    promised: float


def text_of(prompt: Prompt) -> str:
    """What its class is told from."""
    return prompt_text(prompt.content) or ""


def told(workload: Workload, count: int, seed: int) -> Telling:
    """What a classifier learnt from ``count`` prompts a class tells of the others."""
    draw = random.Random(seed)
    groups = {
        name: draw.sample(prompts, len(prompts))
        for name, prompts in workload.by_class().items()
    }
    some = {name: prompts[:count] for name, prompts in groups.items()}
    rest = [prompt for prompts in groups.values() for prompt in prompts[count:]]
    classifier = learn([prompt for prompts in some.values() for prompt in prompts])
    if classifier is None:
        raise click.ClickException(f"{workload.name} must have two classes or more")
    found = [(classifier.tell(text_of(p)), p.prompt_class) for p in rest]
    given = [(one, name) for one, name in found if one.prompt_class is not None]
    odd = []
    for name, prompts in groups.items() if len(groups) > 2 else ():
        without = learn([p for other in some if other != name for p in some[other]])
        assert without is not None
        odd += [without.tell(text_of(p)).prompt_class is None for p in prompts]
    return Telling(
        right=share([one.likeliest == name for one, name in found]),
        told=share([one.prompt_class is not None for one, _ in found]),
        told_right=share([one.prompt_class == name for one, name in given]),
        left_out=share(odd),
        strange=share([classifier.tell(t).prompt_class is None for t in STRANGE]),
        promised=classifier.evidence.accuracy,
    )


def share(values: Sequence[bool]) -> float:
    """Of those that are true; NaN without any."""
    return sum(values) / len(values) if values else math.nan


def milliseconds(work: Callable[[], object], times: int = 200) -> float:
    """Processor time of ``work``, the mean of ``times`` after a few to warm up."""
    for _ in range(5):
        work()
    started = time.process_time()
    for _ in range(times):
        work()
    return 1e3 * (time.process_time() - started) / times


def replayed_gains(
    replayer: Replayer, settings: Sequence[Setting], prompts: Sequence[Prompt]
) -> dict[str, dict[str, float]]:
    """Prompt id -> setting key -> predicted ratio to plain decoding."""
    gains: dict[str, dict[str, float]] = {prompt.id: {} for prompt in prompts}
    plain = {p.id: replayer.measure(PLAIN_SETTING, p) for p in prompts}
    for setting in settings:
        replayer.forget()
        for prompt in prompts:
            sample = replayer.measure(setting, prompt)
            gains[prompt.id][setting.key] = sample.gain(plain[prompt.id])
    return gains


def pool(strategy: type[Strategy], count: int, seed: int) -> list[Setting]:
    """The default setting, and ``count`` drawn from the declared space."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = [
        Setting(strategy.name, suggest(strategy.Params, study.ask()))
        for _ in range(count)
    ]
    first = Setting(strategy.name, defaults(strategy.Params))
    found = {setting.key: setting for setting in [first, *drawn]}
    return list(found.values())


def best(prompts: Sequence[Prompt], logs: Logs) -> str | None:
    """The setting with the highest mean; None where that is plain decoding."""
    totals: dict[str, float] = {}
    for prompt in prompts:
        for key, value in logs[prompt.id].items():
            totals[key] = totals.get(key, 0.0) + value
    if not totals:
        return None
    first = max(totals, key=lambda key: totals[key])
    return first if totals[first] > 0 else None


def gained(
    tuning: Sequence[Prompt], held_out: Sequence[Prompt], logs: Logs, other: str | None
) -> float:
    """Geometric mean over ``held_out``, each class with its own best setting.

    Args:
        other: The setting of prompts of no class that was tuned on.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in tuning:
        groups.setdefault(prompt.prompt_class, []).append(prompt)
    chosen = {name: best(group, logs) for name, group in groups.items()}
    values = [
        logs[prompt.id].get(chosen.get(prompt.prompt_class, other) or "", 0.0)
        for prompt in held_out
    ]
    return math.exp(mean(values))


def compared(
    workload: Workload, ratios: Mapping[str, Mapping[str, float]], seed: int
) -> dict[str, float]:
    """What each way of knowing classes gains, on one division of the prompts.

    Args:
        ratios: Prompt id -> setting -> ratio to plain decoding.
    """
    logs = {
        name: {key: math.log(max(ratio, 1e-6)) for key, ratio in found.items()}
        for name, found in ratios.items()
    }
    tuning, held_out = divided(workload, seed)
    everybody = best(tuning.prompts, logs)
    classifier = learn(tuning.prompts)
    assert classifier is not None
    labelled = [
        replace(p, prompt_class=classifier.tell(text_of(p)).prompt_class or "")
        for p in held_out.prompts
    ]
    return {
        ONE: gained([], held_out.prompts, logs, everybody),
        DECLARED: gained(tuning.prompts, held_out.prompts, logs, everybody),
        TOLD: gained(tuning.prompts, labelled, logs, everybody),
        EACH: math.exp(mean(max(0.0, *logs[p.id].values()) for p in held_out.prompts)),
    }


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean and standard deviation of those that are known."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    if len(known) < 2:
        return form(mean(known))
    return f"{form(mean(known))} ± {form(stdev(known))}"


def show_telling(workload: Workload, seeds: int, console: Console) -> None:
    """The first table."""
    table = Table(title=f"{workload.name}, {len(workload.classes)} classes")
    columns = (
        *("prompts a class", "right", "given a class", "those right"),
        *("class left out: none", "strange: none", "promised right"),
    )
    for column in columns:
        table.add_column(column)
    largest = max(len(prompts) for prompts in workload.by_class().values())
    for count in COUNTS:
        if count > largest:
            continue
        found = [told(workload, count, seed) for seed in range(seeds)]
        table.add_row(
            str(count),
            *(
                spread([getattr(one, name) for one in found], "{:.1%}".format)
                for name in vars(found[0])
            ),
        )
    console.print(table, markup=False)


def show_times(workload: Workload, model: LanguageModel | None) -> None:
    """Processor time of choosing, for prompts from short to long."""
    classifier = learn(workload.prompts)
    assert classifier is not None
    text = "\n".join(text_of(prompt) for prompt in workload.prompts)
    decoder = None if model is None else choosing(model, classifier)
    for size in (60, 600, 6000, 60_000):
        given = text[:size]
        line = f"{milliseconds(partial(classifier.tell, given)):.3f}"
        if model is not None and decoder is not None and model.tokenizer is not None:
            ids = model.encode(given)
            as_text = milliseconds(partial(chosen, decoder, given))
            as_ids = milliseconds(partial(chosen, decoder, ids))
            line += (
                f"; all of choosing: {as_text:.3f} as text, {as_ids:.3f} as "
                f"{len(ids)} token ids"
            )
        click.echo(f"ms of processor time, {size} characters: {line}")


def choosing(model: LanguageModel, classifier: Classifier) -> Decoder:
    """A decoder with a profile of each class."""
    store = MemoryStore()
    place = Decoder(model).environment
    store.add_profiles(
        [
            example_profile(environment=place, prompt_class=name, params={})
            for name in classifier.names
        ]
    )
    store.put_record("r1", KEY, classifier.as_json())
    return Decoder(model, store=store)


def chosen(decoder: Decoder, prompt: str | list[int]) -> object:
    """What a request does to choose, its prompt encoded already."""
    ids = prompt if isinstance(prompt, list) else []
    found = decoder._tell(prompt_text(prompt), ids)
    return decoder.choose(None if found is None else found.prompt_class)


@click.command()
@click.option("--workload", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-m", "--model", "model_path", help="Model folder.")
@click.option("--draft-model", "draft_path", help="Draft model folder.")
@click.option("--record", "at", type=click.Path(path_type=Path))
@click.option("--per-class", default=20, show_default=True)
@click.option("--max-prompt-tokens", default=700, show_default=True)
@click.option("-n", "--max-new-tokens", default=64, show_default=True)
@click.option("--settings", default=20, show_default=True, help="Drawn per strategy.")
@click.option("--seeds", default=10, show_default=True, help="Divisions.")
def main(
    workload: Path,
    model_path: str | None,
    draft_path: str | None,
    at: Path | None,
    per_class: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    settings: int,
    seeds: int,
) -> None:
    """How well classes are told, what that takes, and what errors cost."""
    console = Console(width=120)
    read = read_workload(workload)
    show_telling(read, seeds, console)
    model = None if model_path is None else load_model(model_path)
    show_times(read, model)
    if model is None or at is None:
        return
    host = Host.installed()
    engine = Engine(model, load_model(draft_path) if draft_path else None)
    kept = record(engine, read, per_class, max_prompt_tokens, max_new_tokens, at)
    answers = kept["answers"]
    taken = replace(read, prompts=tuple(p for p in read.prompts if p.id in answers))
    recordings = {
        prompt.id: Recording(
            answers[prompt.id]["prompt"], answers[prompt.id]["tokens"], max_new_tokens
        )
        for prompt in taken.prompts
    }
    costs = kept["costs"]
    draft_costs = ForwardCosts(**costs["draft"]) if costs.get("draft") else None
    replayer = Replayer(
        engine, host, ForwardCosts(**costs["target"]), recordings, draft_costs
    )
    strategies = [
        cls
        for cls in map(host.strategy, STRATEGIES)
        if cls.unavailable(model, engine.draft) is None
    ]
    tried = [one for cls in strategies for one in pool(cls, settings, seed=0)]
    # Suffix remembers earlier outputs, so that neighbours in the file don't help it.
    mixed = list(taken.prompts)
    random.Random(0).shuffle(mixed)
    ratios = replayed_gains(replayer, tried, mixed)
    outcomes = [compared(taken, ratios, seed) for seed in range(seeds)]
    table = Table(
        title=f"{len(taken.prompts)} prompts, {len(tried)} settings of "
        f"{', '.join(cls.name for cls in strategies)}, {seeds} divisions"
    )
    for column in ("classes", "gain", "to declared classes"):
        table.add_column(column)
    for name in outcomes[0]:
        table.add_row(
            name,
            spread([found[name] for found in outcomes], "{:.3f}".format),
            spread(
                [found[name] / found[DECLARED] for found in outcomes], "{:.3f}".format
            ),
        )
    console.print(table, markup=False)


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
