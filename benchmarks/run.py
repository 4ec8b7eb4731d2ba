"""Our decoding against Hugging Face's own, interleaved, on any model and workload.

    python benchmarks/run.py --model M [--draft-model D] [--workload W] [--json OUT]

Every prompt is decoded greedily by every contender before the next prompt, in an order
that rotates, after a warm-up; so drift of the machine falls on all alike. With
``--together`` ours take turns step by step, each at the same place of its answer; then
what drifts within a prompt falls on all alike, too. Times are of
decoding alone, without the prefill. Nothing here asserts a speed. What was measured is
written after every prompt, so a run cut off leaves it.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from adaptspec.decoding.engine import Engine
from adaptspec.decoding.near_ties import near_tie
from adaptspec.environment import environment_of
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.workloads import Workload, example_workload, read_workload
from adaptspec_tuner.measuring.in_turns import SharedAnswer, take_turns
from adaptspec_tuner.measuring.profiler import first_difference
from contenders import (
    HF,
    PLAIN,
    SWEEP,
    Contender,
    Ours,
    Peer,
    exhaust,
    measured,
    theirs,
)
from parts import PARTS, measure_parts, show_parts
from tables import TimedAnswer, show_speeds, show_table, summarise

# id, class, token ids, new tokens
Prompt = tuple[str, str, list[int], int]


def decode_all(
    contenders: Mapping[str, Contender],
    prompts: Sequence[Prompt],
    repeats: int,
    together: bool,
    held: bool,
    say: Callable[[str], None],
    done: Callable[[list[TimedAnswer]], None],
) -> list[TimedAnswer]:
    """Every prompt by every contender, interleaved; ``done`` hears of each prompt.

    Args:
        together: Whether ours take turns step by step.
        held: Whether ours write one answer, whoever comes to a place first.
    """
    names = list(contenders)
    first, short = prompts[0][2], min(4, prompts[0][3])
    for contender in contenders.values():
        if isinstance(contender, Ours):
            contender.warm_up(first, short)
        else:
            contender(first, short)
    runs: list[TimedAnswer] = []
    for turn, (prompt_id, prompt_class, ids, length) in enumerate(prompts):
        say(f"prompt {turn + 1} of {len(prompts)} ({prompt_class}, {len(ids)} tokens)")
        for repeat in range(repeats):
            begin = (turn + repeat) % len(names)
            order = names[begin:] + names[:begin]
            answer, begun = SharedAnswer(), {}
            for name in order:
                if isinstance(contender := contenders[name], Ours):
                    follow = answer.follow(name) if held else None
                    begun[name] = contender.begin(ids, length, follow)
            if together:
                exhaust(take_turns({name: iter(run) for name, run in begun.items()}))
            for name in order:
                if name not in begun:
                    tokens, ms, per = contenders[name](ids, length)
                else:
                    if not together:
                        exhaust(begun[name])
                    tokens, ms, per = measured(begun[name])
                timed = None if ms != ms else ms
                runs.append(
                    TimedAnswer(
                        name, prompt_id, prompt_class, tokens, timed, per, repeat
                    )
                )
        done(runs)
    return runs


def explained(
    model: LanguageModel, runs: Sequence[TimedAnswer], prompts: Mapping[str, list[int]]
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


def parse_contender(value: str) -> tuple[str, str, dict[str, str]]:
    """``LABEL=strategy:name=value,name=value`` to label, strategy, parameters."""
    label, equals, right = value.partition("=")
    strategy, _, rest = right.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not (label and equals and strategy) or any(not p[1] for p in pairs):
        raise click.BadParameter(
            f"LABEL=strategy:name=value,... expected, got {value!r}",
            param_hint="--contender",
        )
    return label, strategy, {name: text for name, _, text in pairs}


def chosen_prompts(
    workload: Workload,
    model: LanguageModel,
    per_class: int,
    length: int,
    longest: int | None,
    skip: int,
    say: Callable[[str], None],
) -> list[Prompt]:
    """Of each class's prompts that are short enough, ``per_class`` after the first
    ``skip``, encoded.

    The classes take turns, so that a run cut off has seen all of them.
    """
    groups: list[list[Prompt]] = []
    for name, prompts in workload.by_class().items():
        encoded = [(p, p.encode(model)) for p in prompts]
        short = [
            (p, ids) for p, ids in encoded if longest is None or len(ids) <= longest
        ]
        if len(short) < len(encoded):
            say(f"{name}: {len(encoded) - len(short)} prompts over {longest} tokens")
        groups.append(
            [
                (p.id, p.prompt_class, ids, p.max_new_tokens or length)
                for p, ids in short[skip : skip + per_class]
            ]
        )
    turns = itertools.zip_longest(*groups)
    chosen = [prompt for turn in turns for prompt in turn if prompt is not None]
    if not chosen:
        raise click.ClickException("no prompt is short enough (--max-prompt-tokens)")
    return chosen


@click.command()
@click.option("-m", "--model", "model_path", required=True, help="Model folder.")
@click.option("--draft-model", "draft_path", help="Draft model folder.")
@click.option("--heads", multiple=True, help="Folder of heads trained for the model.")
@click.option(
    "--workload",
    type=click.Path(exists=True, dir_okay=False),
    help="JSON lines; default: the examples.",
)
@click.option("--per-class", default=2, show_default=True, help="Prompts per class.")
@click.option("--max-prompt-tokens", type=int, help="Leave longer prompts out.")
@click.option(
    "-n",
    "--max-new-tokens",
    default=64,
    show_default=True,
    help="If a prompt is silent.",
)
@click.option("--repeats", default=1, show_default=True, help="Of every prompt.")
@click.option("--dtype", default="auto", show_default=True, help="auto: as stored.")
@click.option("--strategies", help="Only these of ours, separated by commas.")
@click.option(
    "--params",
    multiple=True,
    metavar="STRATEGY.NAME=VALUE",
    help="Instead of a default; for baselines too.",
)
@click.option(
    "--contender",
    multiple=True,
    metavar="LABEL=STRATEGY:NAME=VALUE,...",
    help="One more setting of ours, e.g. prompt_lookup:3=prompt_lookup:draft_length=3.",
)
@click.option(
    "--together",
    is_flag=True,
    help="Ours take turns step by step, not answer by answer.",
)
@click.option(
    "--held",
    is_flag=True,
    help="Ours write one answer, also where a tie would fall otherwise.",
)
@click.option("--keep", is_flag=True, help="Let ours remember earlier prompts.")
@click.option(
    "--baselines", help="Only these of Hugging Face's, by commas; none: ours alone."
)
@click.option("--skip", default=0, show_default=True, help="First prompts left out.")
@click.option("--hf-sweep", is_flag=True, help="Theirs with shorter drafts, too.")
@click.option("--vllm-python", help="A Python that has vLLM: adds it as a contender.")
@click.option(
    "--vllm-method",
    multiple=True,
    type=click.Choice(["plain", "ngram", "draft_model"]),
    default=["plain"],
    show_default=True,
    help="How vLLM decodes.",
)
@click.option(
    "--vllm-length", default=2048, show_default=True, help="Its longest text."
)
@click.option("--flashspec-python", help="A Python that has flashspec: adds it.")
@click.option(
    "--parts",
    default=",".join(PARTS),
    show_default=True,
    help="Parts timed beside; none: leave them out.",
)
@click.option("--no-decode", is_flag=True, help="Time parts only.")
@click.option("--json", "output", type=click.Path(dir_okay=False), help="Write JSON.")
def main(
    model_path: str,
    draft_path: str | None,
    heads: tuple[str, ...],
    workload: str | None,
    per_class: int,
    max_prompt_tokens: int | None,
    max_new_tokens: int,
    repeats: int,
    dtype: str,
    strategies: str | None,
    params: tuple[str, ...],
    contender: tuple[str, ...],
    together: bool,
    held: bool,
    keep: bool,
    baselines: str | None,
    skip: int,
    hf_sweep: bool,
    vllm_python: str | None,
    vllm_method: tuple[str, ...],
    vllm_length: int,
    flashspec_python: str | None,
    parts: str,
    no_decode: bool,
    output: str | None,
) -> None:
    """Measure our decoding against Hugging Face's, and the parts it is made of."""
    wanted_parts = [] if parts == "none" else parts.split(",")
    if unknown := set(wanted_parts) - set(PARTS):
        raise click.BadParameter(
            f"{', '.join(PARTS)} or none expected, got {', '.join(sorted(unknown))}",
            param_hint="--parts",
        )
    console, progress = Console(), Console(stderr=True)
    if not console.is_terminal:  # a log has no margin
        console = Console(width=150)
    host = Host.installed()
    prompts_file = read_workload(Path(workload)) if workload else example_workload()
    model = load_model(model_path, dtype=dtype)
    for folder in heads:
        model.attach(host.open_heads(folder, model))
    draft = load_model(draft_path, dtype=dtype) if draft_path else None
    alone = baselines == "none"
    untouched = (
        None
        if alone and not wanted_parts
        else load_model(model_path, dtype=dtype, accelerate=False)
    )
    result: dict[str, Any] = {
        "machine": machine(model, draft),
        "workload": prompts_file.name,
        "new_tokens": max_new_tokens,
        "repeats": repeats,
        "together": together,
        "held": held,
    }

    def write() -> None:
        if output:
            part = Path(f"{output}.part")
            part.write_text(json.dumps(result, indent=2) + "\n")
            os.replace(part, output)

    if not no_decode:
        plain_draft = (
            load_model(draft_path, dtype=dtype, accelerate=False)
            if draft_path and not alone
            else None
        )
        prompts = chosen_prompts(
            prompts_file,
            model,
            per_class,
            max_new_tokens,
            max_prompt_tokens,
            skip,
            progress.print,
        )
        settings = parse_params(params)
        found: dict[str, Contender] = {}
        used: dict[str, Any] = {}
        kinds: dict[str, str] = {}
        theirs_wanted = baselines.split(",") if baselines else sorted(host.baselines)
        for name in [] if alone else dict.fromkeys([HF, *theirs_wanted]):
            if name not in host.baselines:
                raise click.BadParameter(
                    f"{', '.join(sorted(host.baselines))} expected, got {name!r}",
                    param_hint="--baselines",
                )
            assert untouched is not None
            reason = host.baselines[name].unavailable(untouched, plain_draft)
            if reason is not None:
                progress.print(f"not run: {name}: {reason}", markup=False)
                continue
            values: list[dict[str, Any]] = [settings.get(name, {})]
            if hf_sweep and name in SWEEP:
                field, tried = SWEEP[name]
                values = [{**values[0], field: number} for number in tried]
            for value in values:
                label = name if len(values) == 1 else f"{name}:{value[field]}"
                used[label], kinds[label] = value, name
                found[label] = theirs(untouched, plain_draft, host, name, value)
        engine = Engine(model, draft)
        lossy = {n for n, cls in host.strategies.items() if not cls.lossless}
        lossless = [name for name in host.strategies if name not in lossy]
        ours_wanted = [
            (f"{name} (LOSSY)" * (name in lossy) or name, name, settings.get(name, {}))
            for name in (strategies.split(",") if strategies else lossless)
        ]
        more = [parse_contender(value) for value in contender]
        for label, name, chosen in [(PLAIN, PLAIN, {}), *ours_wanted, *more]:
            if reason := host.strategy(name).unavailable(model, draft):
                progress.print(f"not run: {label}: {reason}", markup=False)
                continue
            if label in kinds and (kinds[label], used[label]) != (name, chosen):
                raise click.BadParameter(
                    f"{label!r} is taken; give another label", param_hint="--contender"
                )
            used[label], kinds[label] = chosen, name
            found[label] = Ours(engine, host, name, chosen, keep)
        peers: dict[str, Peer] = {}
        if vllm_python and "draft_model" in vllm_method and draft_path is None:
            raise click.ClickException("vLLM's draft_model needs --draft-model")
        texts = {prompt[0]: prompt[2] for prompt in prompts}
        result["settings"] = used

        ties: dict[tuple[str, str], bool] = {}
        judged = 0

        def note(runs: list[TimedAnswer]) -> None:
            nonlocal judged
            ties.update(explained(model, runs[judged:], texts))
            judged = len(runs)
            result["table"] = summarise(runs, ties, kinds)
            result["runs"] = [asdict(run) for run in runs]
            write()

        try:
            for method in vllm_method if vllm_python else ():
                kinds[f"vllm_{method}"] = "vllm"
                peers[f"vllm_{method}"] = Peer(
                    vllm_python or "",
                    "peer_vllm.py",
                    *(model_path, draft_path or "", method, str(vllm_length)),
                )
            if flashspec_python:
                kinds["flashspec"] = "flashspec"
                peers["flashspec"] = Peer(
                    flashspec_python,
                    "peer_flashspec.py",
                    *(model_path, draft_path or model_path),
                )
            everyone: dict[str, Contender] = {**found, **peers}
            say = progress.print
            decode_all(everyone, prompts, repeats, together, held, say, note)
        finally:
            for peer in peers.values():
                peer.close()
    if wanted_parts:
        assert untouched is not None
        progress.print(f"parts: {', '.join(wanted_parts)}")
        result.update(
            measure_parts(wanted_parts, model, untouched, host, model_path, dtype)
        )
        write()
    where = result["machine"]
    console.print(
        f"{where['model_name']} {where['dtype']}, draft {where['draft_name']}, "
        f"heads {where['heads_name']}, "
        f"{where['device_name']} ({', '.join(where['instructions'])}), "
        f"{where['threads']} threads, torch {where['versions']['torch']}, "
        f"transformers {where['versions']['transformers']}; Linear: {where['linear']}",
        markup=False,
    )
    if not no_decode:
        show_table(console, f"Decoding, {result['workload']}", result["table"])
        show_speeds(console, result["table"])
    show_parts(console, result)


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
