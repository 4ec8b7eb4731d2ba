"""Milliseconds of a forward by its number of rows, beside what the machine allows.

    python benchmarks/forwards.py MODEL --dtype bfloat16
    python benchmarks/forwards.py MODEL --machine haswell  # with AVX2 alone

The limits are measured between the forwards of the same run: how fast memory is read,
in which a forward reads each weight once, and how much the instructions of the kernels
multiply and add in registers (``peak.c``), which bounds many rows.
Matrix units (AMX) are no part of that: there torch's product of large matrices counts.
To compare two versions, run this file with each of their checkouts first in PYTHONPATH,
in turns, on a machine that does nothing else. Where it does something else, ``--busy``
counts the processor's time of one thread.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from adaptspec.acceleration import native
from adaptspec.acceleration.packed import PackedEmbedding, PackedLinear
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.token_tree import TokenTree

ROWS = (1, 2, 4, 8, 16, 32)
READ_BYTES = 1 << 29  # more than any cache holds
SQUARE = 2048  # rows and columns of matrices that are multiplied
PEAK_STEPS = 20_000  # about a millisecond


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


def seconds_of(run: object, clock: Callable[[], float] = perf_counter) -> float:
    """Of calling it once."""
    assert callable(run)
    started = clock()
    run()
    return clock() - started


def arithmetic(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """What keeps all threads multiplying, and how many operations it does."""
    if native.kernel().tiles and dtype is torch.bfloat16:
        square = torch.randn(SQUARE, SQUARE).to(dtype)
        return lambda: square @ square, 2 * SQUARE**3
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.c")
        include = f"-I{native.KERNEL_FOLDER}"
        command = ["cc", *native.FLAGS, include, "-shared", str(source)]
        subprocess.run([*command, "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    pairs = dtype is torch.bfloat16
    run = library.peak_bf16 if pairs else library.peak_f32
    run.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int]
    out, threads = torch.zeros(1), torch.get_num_threads()
    done = library.per_step() * (library.per_lane() if pairs else 1) * PEAK_STEPS
    return lambda: run(PEAK_STEPS, out.data_ptr(), threads), done * threads


@torch.inference_mode()
def measure(
    model: LanguageModel, context: int, rounds: int, clock: Callable[[], float]
) -> tuple[dict[int, list[float]], float, float]:
    """Seconds of forwards by rows; bytes read and operations done in a second, at most.

    All take turns, so that what else the machine does falls on all of them.
    """
    cache = model.new_cache(context + max(ROWS))
    model.prefill([5 + i % 900 for i in range(context)], cache)
    read = torch.ones(READ_BYTES // 4)
    multiply, operations = arithmetic(model.dtype)
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    reads, products = [], []
    for turn in range(rounds + 1):
        for rows in ROWS:
            tree = TokenTree.chain(5, list(range(6, 5 + rows)))
            took = seconds_of(lambda tree=tree: model.forward_tree(tree, cache), clock)
            cache.truncate(context)
            if turn:  # the first is to warm up
                times[rows].append(took)
        reads.append(seconds_of(read.sum, clock))
        products += [seconds_of(multiply, clock) for _ in range(5)]
    return times, READ_BYTES / min(reads), operations / min(products)


@click.command()
@click.argument("path", metavar="MODEL")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--context", default=200, show_default=True, help="tokens before")
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", type=int, help="default: as torch does")
@click.option("--compile", "compiled", is_flag=True, help="as torch.compile makes it")
@click.option("--plain", is_flag=True, help="the model's own modules")
@click.option("--busy", is_flag=True, help="processor time of one thread")
@click.option(
    "--machine",
    help="instructions of the kernels, as the compiler's -march calls them (haswell: "
    "AVX2; skylake-avx512: AVX-512 without bfloat16); default: this machine's",
)
def main(
    path: str,
    dtype: str,
    context: int,
    rounds: int,
    threads: int | None,
    compiled: bool,
    plain: bool,
    busy: bool,
    machine: str | None,
) -> None:
    """Time forwards of 1 to 32 rows of MODEL."""
    if machine is not None:
        native.FLAGS = tuple(
            f"-march={machine}" if flag.startswith("-march") else flag
            for flag in native.FLAGS
        )
    threads = 1 if busy else threads
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_model(
        path, dtype=dtype, device="cpu", accelerate=not plain, compile=compiled
    )
    read, numbers = weights_read(model)
    times, bandwidth, peak = measure(
        model, context, rounds, thread_time if busy else perf_counter
    )
    console = Console(width=100)
    layers = getattr(model, "fused", 0)
    console.print(
        f"{model.name}, {dtype}, {torch.get_num_threads()} threads"
        f"{' (processor time)' if busy else ''}, behind {context} "
        f"tokens; {model.linear.kind}; {layers} layers in one operation, "
        f"{model.compiled} parts compiled\n"
        f"{read / 1e9:.2f} GB of weights; memory gives {bandwidth / 1e9:.0f} GB/s, "
        f"instructions {peak / 1e9:.0f} GFLOP/s",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(
        *("rows", "median ms", "least ms", "memory ms", "arithmetic ms", "ratio"),
        *("GB/s", "GFLOP/s"),
    )
    for rows, found in times.items():
        memory, sums = read / bandwidth, 2 * numbers * rows / peak
        cells = [median(found), min(found), memory, sums]
        ratio = min(found) / max(memory, sums)
        table.add_row(
            str(rows),
            *(f"{1e3 * seconds:.1f}" for seconds in cells),
            f"{ratio:.2f}",
            f"{read / min(found) / 1e9:.1f}",
            f"{2 * numbers * rows / min(found) / 1e9:.0f}",
        )
    console.print(table)
    console.print("ratio: the least time over the larger limit", highlight=False)


if __name__ == "__main__":
    main()
