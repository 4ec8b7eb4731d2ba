"""What the guard loses on a real model where nothing matches.

    python benchmarks/guarded.py --model M

Prompts are of random tokens, and so are the answers: whatever the model would choose,
a random token is taken in its place, so that no drafter can be right. Each strategy
decodes such an answer first, then three whose text repeats itself, where drafting pays,
and then one more where nothing matches. Plain decoding takes the same tokens, a step
of the one after a step of the other, so that a slow machine is slow for both. Cells are
the time of the whole answer, the prompt's included, over plain decoding's; the column
"plain" compares plain decoding with itself, which tells how exact they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from statistics import mean
from time import perf_counter, thread_time

import click
import torch
from rich.console import Console
from rich.table import Table

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.default_model import default_model_path
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host
from adaptspec.model.loading import load_model
from adaptspec.strategy import Strategy
from contenders import PLAIN

DEFAULT = (PLAIN, "prompt_lookup", "suffix", "token_recycling", "lookahead", "hybrid")
GOOD = 3  # answers between the first one and the last


class Turns:
    """Two engines that decode the same tokens, step by step in turns."""

    def __init__(self, plain: Engine, guarded: Engine, length: int) -> None:
        self.plain, self.guarded, self._length = plain, guarded, length
        self._autoregressive = Host.installed().create(PLAIN, {})

    def ratio(
        self, strategy: Strategy, prompt: Sequence[int], answer: Sequence[int]
    ) -> float:
        """Guarded drafting's time over plain decoding's."""
        controls = Controls(
            max_new_tokens=self._length, temperature=0.0, eos_token_ids=()
        )

        def run(engine: Engine, strategy: Strategy) -> Iterator[list[int]]:
            return iter(
                Run(engine, strategy, prompt, controls, lambda at, own: answer[at])
            )

        both = [
            run(self.plain, self._autoregressive),
            run(self.guarded, strategy),
        ]
        taken, going, turn = [0.0, 0.0], {0, 1}, 0
        while going:
            for one in (0, 1) if turn % 2 else (1, 0):
                started = self.plain.clock()
                if one in going and next(both[one], None) is None:
                    going.remove(one)
                taken[one] += self.plain.clock() - started
            turn += 1
        return taken[1] / taken[0]


@click.command()
@click.option("-m", "--model", "model_path", help="Default: the embedded model.")
@click.option("--draft-model", "draft_path", help="Draft model folder.")
@click.option("-s", "--strategy", "names", multiple=True, help="Default: all of them.")
@click.option("--length", "lengths", multiple=True, type=int, default=(32, 200))
@click.option("--prompt", "size", default=64, show_default=True, help="Its tokens.")
@click.option("--repeats", default=2, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option(
    "--processor-time",
    is_flag=True,
    help="Of one thread, where others use the machine, too.",
)
def main(
    model_path: str | None,
    draft_path: str | None,
    names: Sequence[str],
    lengths: Sequence[int],
    size: int,
    repeats: int,
    threads: int | None,
    processor_time: bool,
) -> None:
    """Print a row for each strategy."""
    if processor_time or threads is not None:
        torch.set_num_threads(1 if processor_time else threads or 1)
    clock = thread_time if processor_time else perf_counter
    model = load_model(model_path or default_model_path())
    draft = load_model(draft_path) if draft_path else None
    host = Host.installed()
    _ = model.latency  # as where costs are stored; or a first hybrid would measure it
    plain = Engine(model, clock=clock, guard=False)
    table = Table(title="time over plain decoding's", title_justify="left")
    for column in ("", *(f"{n}: {w}" for n in lengths for w in ("first", "later"))):
        table.add_column(column)
    for name in names or (*DEFAULT, *(["draft_model"] if draft else [])):
        if reason := host.strategy(name).unavailable(model, draft):
            click.echo(f"not run: {name}: {reason}", err=True)
            continue
        cells = []
        for length in lengths:
            found = []
            for seed in range(repeats):
                rng = random.Random(seed)
                guarded = Engine(model, draft, clock=clock)
                turns = Turns(plain, guarded, length)
                strategy = host.create(name, {})

                def tokens(count: int, rng: random.Random = rng) -> list[int]:
                    return [rng.randrange(1000, model.vocab_size) for _ in range(count)]

                first = turns.ratio(strategy, tokens(size), tokens(length))
                for _ in range(GOOD):
                    text = tokens(16) * (1 + (size + length) // 16)
                    turns.ratio(strategy, text[:size], text[size : size + length])
                later = turns.ratio(strategy, tokens(size), tokens(length))
                found.append((first, later))
            cells += [f"{mean(ratios):.3f}" for ratios in zip(*found, strict=True)]
            click.echo(f"{name}, {length}: {found}", err=True)
        table.add_row(name, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    try:
        main()
    except AdaptSpecError as error:
        raise SystemExit(f"Error: {error}") from None
