"""``adaptspec train``: weights of drafters, learnt from the target itself."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from adaptspec.cli.output import (
    print_json,
    stderr_console,
    stdout_console,
    without_loading_bars,
)


@click.group()
def train() -> None:
    """Train what strategies draft with, for your model."""


@train.command()
@click.option("-m", "--model", help="Model folder; default: the embedded model.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSON lines of prompts or conversations, as for tune, or ShareGPT's layout.",
)
@click.option(
    "--self-prompts",
    type=click.IntRange(min=2),
    help="Instead of --data: the model writes this many prompts itself.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for the heads; an unfinished run in it is continued.",
)
@click.option(
    "--method",
    type=click.Choice(["medusa-1", "medusa-2"]),
    default="medusa-1",
    show_default=True,
    help="Heads only, or heads and target (LoRA).",
)
@click.option(
    "--answers",
    type=click.Choice(["auto", "self", "given"]),
    default="auto",
    show_default=True,
    help="The model's own, or the data's; auto: the data's where it has them.",
)
@click.option(
    "--heads",
    type=click.IntRange(1, 8),
    default=4,
    show_default=True,
    help="Number of heads; each guesses one token further ahead.",
)
@click.option(
    "--layers",
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    help="Residual blocks of a head.",
)
@click.option(
    "--lm-head",
    "output",
    type=click.Choice(["own", "joint", "base"]),
    default="joint",
    show_default=True,
    help="One per head, one that heads share, or the target's.",
)
@click.option(
    "--draft-vocab",
    type=click.IntRange(min=0),
    default=16384,
    show_default=True,
    help="Tokens that heads tell apart, the commonest in answers; 0: all.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Passes over the answers.",
)
@click.option(
    "--joint-epochs",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Epochs of medusa-2's second stage.",
)
@click.option(
    "--lr",
    "learning_rate",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-4,
    show_default=True,
    help="Peak learning rate; heads learn at --heads-factor times this.",
)
@click.option(
    "--heads-factor",
    type=click.FloatRange(min=0, min_open=True),
    default=4.0,
    show_default=True,
    help="The heads' learning rate as a multiple of --lr.",
)
@click.option(
    "--warmup",
    "warmup_steps",
    type=click.IntRange(1),
    default=40,
    show_default=True,
    help="Steps of rising rate, at most a tenth of all.",
)
@click.option(
    "--decay",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.8,
    show_default=True,
    help="Weight of a head's loss against the one before.",
)
@click.option(
    "--heads-weight",
    type=float,
    help="medusa-2: weight of the heads' loss; default 0.2, own answers 0.01.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Answer tokens of a step.",
)
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Positions computed at once; fewer take less memory.",
)
@click.option(
    "--max-length",
    type=click.IntRange(8),
    default=2048,
    show_default=True,
    help="Tokens of a sequence; longer ones are cut.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Answers to each prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.3,
    show_default=True,
    help="Temperature of the answers; 0 is greedy.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Most tokens of an answer, where the data doesn't say.",
)
@click.option(
    "--answer-batch",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Prompts answered at once.",
)
@click.option(
    "--answer-budget", help="Stop answering after 20m, 1h...; train on what is there."
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the prompts kept for measuring.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Precision of products; auto: bfloat16 where model and machine have it.",
)
@click.option(
    "--features",
    type=click.Choice(["auto", "store", "recompute"]),
    default="auto",
    show_default=True,
    help="Keep hidden states on disk, or compute them in every epoch.",
)
@click.option(
    "--load-in",
    type=click.Choice(["4bit", "8bit"]),
    help="Quantise the frozen target (bitsandbytes).",
)
@click.option(
    "--dtype", default="auto", show_default=True, help="Type of the target's weights."
)
@click.option("--device", help="Default: CUDA if there is one, else the CPU.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that comes with a model. Only for models you trust.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of answers and training.",
)
@click.option("--fresh", is_flag=True, help="Drop an unfinished run in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def medusa(
    model: str | None,
    data: Path | None,
    out: Path,
    load_in: str | None,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
    threads: int | None,
    answer_budget: str | None,
    self_prompts: int | None,
    fresh: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Train Medusa heads: they guess several tokens ahead from one hidden state.

    The model answers the prompts itself and the heads learn what it says. Stopped or
    killed, the same command continues.
    """
    from adaptspec.cli.progress import Progress
    from adaptspec.cli.quantities import duration
    from adaptspec.errors import TrainingError
    from adaptspec_training.conversations import read_data
    from adaptspec_training.options import Options
    from adaptspec_training.pipeline import train_medusa
    from adaptspec_training.report import print_report

    seconds = None if answer_budget is None else duration(answer_budget)
    if answer_budget is not None and seconds is None:
        raise TrainingError(
            "--answer-budget must be a time such as 90s, 20m or 1h30m, got "
            f"{answer_budget!r}"
        )
    options = Options(**chosen, self_prompts=self_prompts or 0, answer_seconds=seconds)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    errors = stderr_console()
    progress = Progress(errors, time.monotonic)
    workload = None if data is None else read_data(data, progress.say)
    if model is None:
        from adaptspec.default_model import default_model_path

        model = str(default_model_path(lambda text: errors.print(text, markup=False)))
    try:
        with without_loading_bars():
            trained = train_medusa(
                model,
                workload,
                out,
                options,
                dtype=dtype,
                device=device,
                load_in=load_in,
                trust_remote_code=trust_remote_code,
                fresh=fresh,
                progress=progress,
            )
    except KeyboardInterrupt:
        click.echo("Error: stopped; the same command continues", err=True)
        sys.exit(130)
    if as_json:
        print_json(trained.report)
    else:
        print_report(trained.report, trained.folder, stdout_console())
