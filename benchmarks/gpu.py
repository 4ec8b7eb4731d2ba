"""Checks and tables of fixed shapes and graphs on a GPU, in less than ten minutes.

    python benchmarks/gpu.py MODEL --draft DRAFT > gpu.md

Tiny random models of each bundled kind come first: their greedy output must be that of
their own ``generate``, and the logits of each width those of dynamic shapes. Then MODEL
is asked the same, and timed: forwards by rows with graphs, in fixed shapes without, and
in dynamic ones, and strategies beside plain decoding with graphs of its own. Without
MODEL only the tiny models are checked. Where time runs out, what is left out is named.

``--device cpu`` goes through the same steps where there is no GPU, without graphs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.environment import device_name
from adaptspec.host import Host
from adaptspec.model.checkpoints import device_named, read_model, read_tokenizer
from adaptspec.model.fixed_shapes import WIDTHS, Shapes
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.reference import logit_distance
from adaptspec.testing.fakes import ARCHITECTURES, random_ids, tiny_module
from adaptspec.token_tree import TokenTree

SHAPES: tuple[Shapes, ...] = ("auto", "fixed", "dynamic")
STRATEGIES = ("autoregressive", "suffix", "hybrid", "draft_model")
# A hybrid times forwards before it decodes, which tiny models aren't worth.
TINY_STRATEGIES = (
    *("autoregressive", "prompt_lookup", "suffix", "token_recycling", "draft_tree"),
)
TINY_TOKENS = 16
# Most that logits of two shapes may be apart: rounding moves them.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
TEXTS = (
    "Write a short story about a lighthouse keeper who finds a map in a bottle.",
    "Write a Python class for a bounded queue with put, get, and size. Then write the "
    "same class again with type hints and docstrings.",
    "Repeat this list as JSON, sorted by price, with the same keys: "
    '[{"name": "pen", "price": 2}, {"name": "ink", "price": 7}, '
    '{"name": "pad", "price": 3}]',
    "What are the three laws of thermodynamics? Answer in three sentences.",
)


@dataclass
class Session:
    """What a run has left, and what went wrong in it."""

    limit: float
    started: float = field(default_factory=perf_counter)
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def allows(self, what: str, needed: float = 0.0) -> bool:
        """Whether there is time for ``what``; if not it is noted."""
        if perf_counter() - self.started + needed < self.limit:
            return True
        self.left_out.append(what)
        return False

    def check(self, fine: bool, fault: str) -> str:
        """Note a fault; what a table says of it."""
        if not fine:
            self.faults.append(fault)
        return "yes" if fine else "NO"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def wait(device: torch.device) -> None:
    """Until it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    wait(device)
    started = perf_counter()
    run()
    wait(device)
    return perf_counter() - started


def own_greedy(model: LanguageModel, ids: Sequence[int], tokens: int) -> list[int]:
    """What the caller's module generates by itself."""
    given = torch.tensor([list(ids)], device=model.device)
    source: Any = model.source
    with torch.inference_mode():
        output = source.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in output[0, len(ids) :]]


def decoded(
    strategy: str,
    model: LanguageModel,
    draft: LanguageModel | None,
    ids: Sequence[int],
    tokens: int,
) -> tuple[list[int], float]:
    """Greedy tokens, and how many came in a second after the prompt was read."""
    built = Host.installed().strategy(strategy)()
    run = Engine(model, draft, guard=False).generate(
        built, list(ids), Controls.greedy(tokens)
    )
    took = sum(
        step.seconds_target + step.seconds_draft + step.seconds_rest
        for step in run.stats.steps
    )
    return run.token_ids, (len(run.token_ids) - 1) / took if took else 0.0


def apart(one: LanguageModel, other: LanguageModel, ids: Sequence[int]) -> float:
    """How far logits of two models over one module are apart, over all widths."""
    worst = 0.0
    caches = [model.new_cache(len(ids) + 4 * sum(WIDTHS)) for model in (one, other)]
    for model, cache in zip((one, other), caches, strict=True):
        model.prefill(ids, cache)
    for width in WIDTHS:
        tokens = [ids[at % len(ids)] for at in range(width)]
        tree = TokenTree(tokens, [-1, *((at - 1) // 2 for at in range(1, width))])
        if one.max_length is not None and caches[0].length + width > one.max_length:
            break
        cached = caches[0].length
        found = [
            model.forward_tree(tree, cache).logits
            for model, cache in zip((one, other), caches, strict=True)
        ]
        distances = sorted(
            logit_distance(ours, own) for ours, own in zip(*found, strict=True)
        )
        worst = max(worst, distances[len(distances) // 2])
        for cache in caches:
            cache.keep(cached, [0, 2] if width > 2 else [0])
    return worst


def check_tiny(
    session: Session, device: torch.device, names: Sequence[str] = tuple(ARCHITECTURES)
) -> str:
    """Each bundled kind of model, with every strategy that needs nothing trained."""
    rows = []
    ids = random_ids(8) * 2
    for name in names:
        if not session.allows(f"tiny {name}", 20.0):
            continue
        module = tiny_module(name).to(device)
        shapes: Shapes = "fixed" if device.type == "cpu" else "auto"
        model = LanguageModel(module, shapes=shapes)
        draft = LanguageModel(module, shapes=shapes)
        rung = (model.capability, model.shapes)[1]
        truth = own_greedy(model, ids, TINY_TOKENS)
        equal, asked = 0, 0
        for strategy in TINY_STRATEGIES:
            if Host.installed().strategy(strategy).unavailable(model, draft):
                continue
            asked += 1
            equal += decoded(strategy, model, draft, ids, TINY_TOKENS)[0] == truth
        distance = 0.0
        if rung.kind != "dynamic":
            distance = apart(model, LanguageModel(module, shapes="dynamic"), ids)
        rows.append(
            [
                name,
                model.capability.level,
                rung.kind,
                rung.reason or "-",
                f"{equal}/{asked}",
                session.check(
                    equal == asked and distance <= ROUNDING[torch.float32],
                    f"tiny {name}: {equal} of {asked} equal, logits {distance:.2g}",
                ),
            ]
        )
    head = ("tiny model", "verifies", "shapes", "why not more", "as generate", "fine")
    return table(head, rows)


def modes(
    module: Any, tokenizer: Any, device: torch.device
) -> Iterator[tuple[str, LanguageModel]]:
    """One module in each shape that it can have there."""
    for shapes in SHAPES:
        if shapes == "auto" and device.type == "cpu":
            continue
        model = LanguageModel(module, tokenizer, shapes=shapes)
        kind = (model.capability, model.shapes)[1].kind
        if shapes == "dynamic" or kind == ("graphs" if shapes == "auto" else shapes):
            yield kind, model


def _likeliest(model: LanguageModel, tree: TokenTree, cache: Any) -> Sequence[int]:
    """What a greedy step needs of a forward."""
    return model.forward_tree(tree, cache).best


def time_forwards(
    session: Session, models: dict[str, LanguageModel], context: int, rounds: int
) -> str:
    """Milliseconds by rows; each shape takes turns with the others."""
    times: dict[tuple[str, int], list[float]] = {}
    caches = {}
    ids = [5 + at % 50 for at in range(context)]
    for kind, model in models.items():
        caches[kind] = model.new_cache(context + max(WIDTHS))
        model.prefill(ids, caches[kind])
    for turn in range(rounds + 2):
        if not session.allows(f"round {turn} of forwards"):
            break
        for width in WIDTHS:
            tree = TokenTree.chain(5, [6 + at % 50 for at in range(width - 1)])
            for kind, model in models.items():
                cache = caches[kind]
                run = functools.partial(_likeliest, model, tree, cache)
                took = seconds(run, model.device)
                cache.truncate(context)
                if turn > 1:  # the first two warm up
                    times.setdefault((kind, width), []).append(took)
    rows = [
        [
            width,
            *(
                f"{1e3 * median(times[kind, width]):.2f}"
                if (kind, width) in times
                else "-"
                for kind in models
            ),
        ]
        for width in WIDTHS
    ]
    return table(["rows", *(f"{kind} ms" for kind in models)], rows)


def time_strategies(
    session: Session,
    models: dict[str, LanguageModel],
    drafts: dict[str, LanguageModel],
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> str:
    """Tokens a second; ratios are to plain decoding in the same shapes."""
    rows = []
    plain: dict[str, float] = {}
    for strategy in STRATEGIES:
        for kind, model in models.items():
            draft = drafts.get(kind)
            built = Host.installed().strategy(strategy)
            if built.unavailable(model, draft):
                continue
            if not session.allows(f"{strategy} with {kind} shapes", 20.0):
                continue
            speeds, equal = [], 0
            for ids in prompts:
                decoded(strategy, model, draft, ids, min(8, tokens))  # captures
                found, speed = decoded(strategy, model, draft, ids, tokens)
                truth = own_greedy(model, ids, tokens)
                speeds.append(speed)
                equal += found == truth[: len(found)]
            speed = median(speeds)
            if strategy == "autoregressive":
                plain[kind] = speed
            # In half precision rounding decides between tokens of nearly equal logits.
            exact = model.dtype is torch.float32
            rows.append(
                [
                    strategy,
                    kind,
                    f"{speed:.1f}",
                    f"{speed / plain[kind]:.2f}" if plain.get(kind) else "-",
                    f"{equal}/{len(prompts)}",
                    session.check(
                        equal == len(prompts) or not exact,
                        f"{strategy}, {kind}: {equal} of {len(prompts)} equal",
                    ),
                ]
            )
    head = ("strategy", "shapes", "tokens/s", "to plain", "as generate", "fine")
    return table(head, rows)


def measure_model(
    session: Session,
    path: str,
    draft_path: str | None,
    dtype: str,
    device: torch.device,
    tokens: int,
    rounds: int,
) -> None:
    """Check and time a real model; prints its tables."""
    module = read_model(path, dtype, device, False)
    tokenizer = read_tokenizer(path, False)
    models = dict(modules := list(modes(module, tokenizer, device)))
    drafts: dict[str, LanguageModel] = {}
    if draft_path is not None:
        drafts = dict(modes(read_model(draft_path, dtype, device, False), None, device))
    one = modules[0][1]
    click.echo(f"\n{one.name}, {one.dtype}; {one.shapes.kind} {one.shapes.reason}\n")
    prompts = [one.encode(text) for text in TEXTS]
    for kind, model in models.items():
        if kind != "dynamic":
            distance = apart(model, models["dynamic"], prompts[0])
            fine = session.check(
                distance <= ROUNDING.get(model.dtype, 0.1),
                f"{model.name}, {kind}: logits {distance:.2g} from dynamic shapes",
            )
            click.echo(f"{kind}: logits {distance:.2g} (relative) apart, fine: {fine}")
    context = min(200, (one.max_length or 1 << 30) - 2 * max(WIDTHS))
    if session.allows("forwards", 30.0) and context > 0:
        click.echo("\n" + time_forwards(session, models, context, rounds))
    click.echo(time_strategies(session, models, drafts, prompts, tokens))


@click.command()
@click.argument("path", metavar="[MODEL]", required=False)
@click.option("--draft", "draft_path", help="A draft model of the same vocabulary.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--tokens", default=96, show_default=True, help="Of each answer.")
@click.option("--rounds", default=20, show_default=True, help="Of timed forwards.")
@click.option(
    "--tiny",
    multiple=True,
    type=click.Choice([*ARCHITECTURES]),
    help="Tiny models to check; default: all.",
)
@click.option("--limit", default=540.0, show_default=True, help="Seconds.")
def main(
    path: str | None,
    draft_path: str | None,
    device: str,
    dtype: str,
    tokens: int,
    rounds: int,
    tiny: tuple[str, ...],
    limit: float,
) -> None:
    """Check fixed shapes and graphs, and time them on MODEL; prints Markdown."""
    session, place = Session(limit), device_named(device)
    click.echo(
        f"{device_name(place)}, torch {torch.__version__}, "
        f"python {sys.version.split()[0]}\n"
    )
    click.echo(check_tiny(session, place, tiny or tuple(ARCHITECTURES)))
    if path is not None:
        measure_model(session, path, draft_path, dtype, place, tokens, rounds)
    for what in session.left_out:
        click.echo(f"left out for want of time: {what}")
    for fault in session.faults:
        click.echo(f"FAULT: {fault}")
    took = perf_counter() - session.started
    click.echo(f"{len(session.faults)} faults in {took:.0f} seconds")
    sys.exit(1 if session.faults else 0)


if __name__ == "__main__":
    main()
