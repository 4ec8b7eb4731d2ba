"""Strategies against answers recorded once: many prompts, little noise.

    python benchmarks/recorded.py --model M --draft-model D --workload W --record FILE

The target decodes every prompt plainly, once; then each strategy's own drafter and the
engine run on the recorded answers (the tuner's replay), and a forward takes what the
hardware's costs say. So strategies differ by what they draft and by nothing else, which
a table of times on a shared machine can't show. Drafters are shown the 32 highest
logits after committed tokens. What the target thought after wrong guesses isn't on
record, so token recycling, alone and in the hybrid, does better in truth. A strategy
keeps what it learns from one prompt to the next, in an order drawn by
``--seed``; with ``--orders N`` figures are means over as many orders, each begun with
nothing learnt.

With ``--tune N`` a strategy's parameters are searched first, for each class on every
second prompt by N trials of the tuner's own search, and the table is of the others.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.hardware_costs import ForwardCosts, measure_costs
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.strategy import Strategy, union
from adaptspec.workloads import Prompt, Workload, read_workload
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Recording, Sample, Setting
from adaptspec_tuner.replaying.presearch import presearch
from adaptspec_tuner.replaying.replayer import Replayer
from contenders import PLAIN
from run import parse_contender
from tables import ALL

RECORDED_LIKELIEST = 32
DEFAULT = (
    "prompt_lookup=prompt_lookup",
    "suffix=suffix",
    "token_recycling=token_recycling:draft_length=7",
    "draft_model=draft_model:draft_length=3",
    "hybrid, free=hybrid:use_draft=no",
    "hybrid=hybrid",
)


def record(
    engine: Engine,
    workload: Workload,
    per_class: int,
    longest: int,
    new: int,
    at: Path,
    skip: int = 0,
) -> dict[str, Any]:
    """Costs and answers, from ``at`` where they are there already."""
    model, draft = engine.model, engine.draft
    kept: dict[str, Any] = {"model": model.digest, "new": new, "answers": {}}
    if at.exists():
        kept = json.loads(at.read_text())
        if (kept["model"], kept["new"]) != (model.digest, new):
            raise click.ClickException(f"{at} is of another model or length")

    def write() -> None:
        part = at.with_name(at.name + ".part")
        part.write_text(json.dumps(kept))
        os.replace(part, at)

    if "costs" not in kept:
        kept["costs"] = measure_costs(
            model, draft, contexts=(128, 1024), longest=40
        ).as_json()
        write()
    for name, prompts in workload.by_class().items():
        short = [(p, p.encode(model)) for p in prompts]
        short = [(p, ids) for p, ids in short if len(ids) <= longest]
        short = short[skip : skip + per_class]
        for number, (prompt, ids) in enumerate(short):
            if prompt.id in kept["answers"]:
                continue
            click.echo(f"recording {name}, {number + 1} of {len(short)}", err=True)
            controls = Controls.for_model(model, temperature=0, max_new_tokens=new)
            plain = Host.installed().create(PLAIN, {})
            done = engine.generate(plain, ids, controls)
            kept["answers"][prompt.id] = {
                "class": name,
                "prompt": ids,
                "tokens": done.token_ids,
            }
            write()
    return kept


def replay(
    replayer: Replayer, setting: Setting, prompts: Sequence[Prompt]
) -> dict[str, Sample]:
    """By prompt; the strategy remembers earlier ones."""
    return {prompt.id: replayer.measure(setting, prompt) for prompt in prompts}


def tuned(
    replayer: Replayer,
    cls: type[Strategy],
    prompts: Sequence[Prompt],
    trials: int,
    seed: int,
) -> dict[str, Sample]:
    """By prompt of the second half of its class, the setting best on the first half."""
    halves: dict[str, tuple[list[Prompt], list[Prompt]]] = {}
    for prompt in prompts:
        first, second = halves.setdefault(prompt.prompt_class, ([], []))
        (second if len(second) < len(first) else first).append(prompt)
    tried = presearch(
        replayer,
        [cls],
        {name: first for name, (first, _) in halves.items()},
        in_time=lambda: True,
        clock=perf_counter,
        warn=lambda text: click.echo(text, err=True),
        seed=seed,
        trials=trials,
    )
    found: dict[str, Sample] = {}
    for name, (_, second) in halves.items():
        best = tried.ranked(name, cls.name)[0].params
        click.echo(f"{name}: {cls.name} {dict(best)}", err=True)
        replayer.forget()
        found |= replay(replayer, Setting(cls.name, dict(best)), second)
    return found


def pace(samples: Sequence[Sample]) -> float:
    """Tokens a second over all, the first of each left out."""
    decoded = [(len(s.tokens) - 1, s.speed) for s in samples if s.speed]
    return sum(n for n, _ in decoded) / sum(n / speed for n, speed in decoded)


def compared(
    samples: dict[str, Sample],
    plain: dict[str, Sample],
    answers: dict[str, Any],
    group: str,
) -> tuple[float, float]:
    """Tokens per forward and speed-up over plain decoding in a class, or in all."""
    ids = [key for key in samples if group in (answers[key]["class"], ALL)]
    tokens = sum(len(samples[key].tokens) - 1 for key in ids)
    forwards = sum(samples[key].forwards for key in ids)
    ratio = pace([samples[key] for key in ids]) / pace([plain[key] for key in ids])
    return tokens / max(1, forwards), ratio


@click.command()
@click.option("-m", "--model", "model_path", required=True, help="Model folder.")
@click.option("--draft-model", "draft_path", help="Draft model folder.")
@click.option("--heads", multiple=True, help="Folder of heads trained for the model.")
@click.option("--workload", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--record", "at", required=True, type=click.Path(path_type=Path))
@click.option("--per-class", default=4, show_default=True)
@click.option("--skip", default=0, show_default=True, help="First prompts left out.")
@click.option("--max-prompt-tokens", default=700, show_default=True)
@click.option("-n", "--max-new-tokens", default=64, show_default=True)
@click.option("--contender", multiple=True, metavar="LABEL=STRATEGY:NAME=VALUE,...")
@click.option("--seed", default=0, show_default=True, help="Of the prompts' order.")
@click.option("--orders", default=1, show_default=True, help="Orders of the prompts.")
@click.option("--tune", "trials", type=int, help="Trials of each class and strategy.")
@click.option("--record-only", is_flag=True, help="Stop once all is recorded.")
def main(
    model_path: str,
    draft_path: str | None,
    heads: tuple[str, ...],
    workload: Path,
    at: Path,
    per_class: int,
    skip: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    contender: tuple[str, ...],
    seed: int,
    orders: int,
    trials: int | None,
    record_only: bool,
) -> None:
    """Replay strategies on recorded answers, a column per class."""
    host = Host.installed()
    model: LanguageModel = load_model(model_path)
    for folder in heads:
        model.attach(host.open_heads(folder, model))
    engine = Engine(model, load_model(draft_path) if draft_path else None)
    prompts_file = read_workload(workload)
    kept = record(
        engine, prompts_file, per_class, max_prompt_tokens, max_new_tokens, at, skip
    )
    if record_only:
        return
    answers = kept["answers"]
    recordings = {
        name: Recording(a["prompt"], a["tokens"], max_new_tokens)
        for name, a in answers.items()
    }
    costs = kept["costs"]
    draft_costs = ForwardCosts(**costs["draft"]) if costs.get("draft") else None
    runs = []
    for label, name, params in map(parse_contender, contender or DEFAULT):
        cls = host.strategy(name)
        if reason := cls.unavailable(model, engine.draft):
            click.echo(f"not run: {label}: {reason}", err=True)
            continue
        runs.append((label, cls, cls.Params.parse(params, name).model_dump()))
    observes = union([host.create(cls.name, v).observes(model) for _, cls, v in runs])
    target = ForwardCosts(**costs["target"])
    replayer = Replayer(
        engine, host, target, recordings, draft_costs, RECORDED_LIKELIEST, observes
    )
    shuffled = []
    for order in range(seed, seed + orders):
        prompts = [Prompt(name, a["class"], text="") for name, a in answers.items()]
        random.Random(order).shuffle(prompts)
        shuffled.append(prompts)
    classes = list(dict.fromkeys(a["class"] for a in answers.values()))
    table = Table(title="tokens per forward / speed-up", title_justify="left")
    for column in ("", *classes, ALL):
        table.add_column(column)
    plain = replay(replayer, PLAIN_SETTING, shuffled[0])
    for label, cls, values in runs:
        found = []
        for number, prompts in enumerate(shuffled):
            replayer.forget()
            if trials is None:
                found.append(replay(replayer, Setting(cls.name, values), prompts))
            else:
                found.append(tuned(replayer, cls, prompts, trials, seed + number))
        cells = []
        for group in (*classes, ALL):
            tokens, ratios = zip(
                *(compared(samples, plain, answers, group) for samples in found),
                strict=True,
            )
            cells.append(f"{mean(tokens):.2f}/{mean(ratios):.3f}")
        table.add_row(label, *cells)
        click.echo(f"{label}: {cells[-1]}", err=True)
    Console(width=170).print(table, markup=False)


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
