"""Milliseconds of a forward by its number of rows, beside what the machine allows.

    python benchmarks/forwards.py MODEL --dtype bfloat16

The limits are measured between the forwards of the same run: how fast memory is read,
in which a forward reads each weight once, and how fast torch multiplies large matrices
of the type, which bounds many rows. To compare two versions, run this file with each of
their checkouts first in PYTHONPATH, in turns, on a machine that does nothing else.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from adaptspec.acceleration.packed import PackedEmbedding, PackedLinear
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.token_tree import TokenTree

ROWS = (1, 2, 4, 8, 16, 32)
READ_BYTES = 1 << 29  # more than any cache holds
SQUARE = 2048  # rows and columns of matrices that are multiplied


def weights_read(model: LanguageModel) -> tuple[int, int]:
    """Bytes and numbers that a forward multiplies by, each counted once."""
    sizes: dict[int, tuple[int, int]] = {}
    for module in model.model.modules():
        packed = getattr(module, "packed", None)
        if isinstance(module, PackedLinear) and packed is not None:
            outer, inner = packed.shape
            sizes[id(packed)] = packed.nbytes, outer * inner
            continue
        if isinstance(module, nn.Embedding | PackedEmbedding):
            continue  # a row of it is looked up; as a tied head it is a Linear's
        for parameter in module.parameters(recurse=False):
            sizes[id(parameter)] = parameter.nbytes, parameter.numel()
    return sum(b for b, _ in sizes.values()), sum(n for _, n in sizes.values())


def seconds_of(run: object) -> float:
    """Of calling it once."""
    assert callable(run)
    started = perf_counter()
    run()
    return perf_counter() - started


@torch.inference_mode()
def measure(
    model: LanguageModel, context: int, rounds: int
) -> tuple[dict[int, list[float]], float, float]:
    """Seconds of forwards by rows; bytes read and operations done in a second, at most.

    All take turns, so that what else the machine does falls on all of them.
    """
    cache = model.new_cache(context + max(ROWS))
    model.prefill([5 + i % 900 for i in range(context)], cache)
    read = torch.ones(READ_BYTES // 4)
    square = torch.randn(SQUARE, SQUARE).to(model.dtype)
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    reads, products = [], []
    for turn in range(rounds + 1):
        for rows in ROWS:
            tree = TokenTree.chain(5, list(range(6, 5 + rows)))
            took = seconds_of(lambda tree=tree: model.forward_tree(tree, cache))
            cache.truncate(context)
            if turn:  # the first is to warm up
                times[rows].append(took)
        reads.append(seconds_of(read.sum))
        products.append(seconds_of(lambda: square @ square))
    return times, READ_BYTES / min(reads), 2 * SQUARE**3 / min(products)


@click.command()
@click.argument("path", metavar="MODEL")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--context", default=200, show_default=True, help="tokens before")
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", type=int, help="default: as torch does")
def main(path: str, dtype: str, context: int, rounds: int, threads: int | None) -> None:
    """Time forwards of 1 to 32 rows of MODEL."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(path, dtype=dtype, device="cpu")
    read, numbers = weights_read(model)
    times, bandwidth, arithmetic = measure(model, context, rounds)
    console = Console(width=100)
    layers = getattr(model, "fused", 0)
    console.print(
        f"{model.name}, {dtype}, {torch.get_num_threads()} threads, behind {context} "
        f"tokens; {model.linear.kind}; {layers} layers in one operation\n"
        f"{read / 1e9:.2f} GB of weights; memory gives {bandwidth / 1e9:.0f} GB/s, "
        f"large products {arithmetic / 1e9:.0f} GFLOP/s",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(
        "rows", "median ms", "least ms", "memory ms", "arithmetic ms", "ratio"
    )
    for rows, found in times.items():
        memory, sums = read / bandwidth, 2 * numbers * rows / arithmetic
        cells = [median(found), min(found), memory, sums]
        ratio = min(found) / max(memory, sums)
        table.add_row(
            str(rows), *(f"{1e3 * seconds:.1f}" for seconds in cells), f"{ratio:.2f}"
        )
    console.print(table)
    console.print("ratio: the least time over the larger limit", highlight=False)


if __name__ == "__main__":
    main()
