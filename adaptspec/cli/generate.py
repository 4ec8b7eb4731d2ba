"""``adaptspec generate``: decode one prompt with the profiled or a given strategy."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from adaptspec.cli.output import print_json, without_loading_bars
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host


@click.command()
@click.argument("prompt", required=False)
@click.option("-m", "--model", help="Model folder; default: the embedded model.")
@click.option("--draft-model", help="Draft model folder.")
@click.option(
    "--heads", multiple=True, metavar="DIR", help="Heads trained for the model."
)
@click.option("--db", help="Profile database: path or SQLAlchemy URL.")
@click.option("--class", "prompt_class", help="The prompt's class.")
@click.option("-s", "--strategy", help="Use this strategy, whatever was measured.")
@click.option(
    "-p", "--param", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter."
)
@click.option(
    "--allow-lossy",
    is_flag=True,
    help="Let the choice fall on a strategy that changes sampled output.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Default: the model's configuration, else 128.",
)
@click.option("-t", "--temperature", type=float, help="0 is greedy.")
@click.option("--seed", type=int, help="Of sampling; default: drawn, and printed.")
@click.option(
    "-c",
    "--control",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Any other generation control; VALUE is JSON, null is off.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="auto: as the weights are stored.",
)
@click.option("--raw", is_flag=True, help="Don't apply the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print text and figures as JSON.")
@click.pass_obj
def generate(
    host: Host,
    prompt: str | None,
    model: str | None,
    draft_model: str | None,
    heads: tuple[str, ...],
    db: str | None,
    prompt_class: str | None,
    strategy: str | None,
    param: tuple[tuple[str, str], ...],
    allow_lossy: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    control: tuple[tuple[str, str], ...],
    dtype: str,
    raw: bool,
    as_json: bool,
) -> None:
    """Decode PROMPT (default: standard input); text to stdout, figures to stderr."""
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise AdaptSpecError("the prompt is empty; pass it as argument or on stdin")
    if param and strategy is None:
        raise AdaptSpecError("--param needs --strategy")
    from adaptspec.decoder import load

    if model is None:
        from adaptspec.default_model import default_model_path

        model = str(default_model_path(lambda line: click.echo(line, err=True)))
    with without_loading_bars():
        decoder = load(
            model,
            draft_model,
            db,
            dtype=dtype,
            host=host,
            heads=heads,
            allow_lossy=allow_lossy,
        )
    chat = getattr(decoder.model.tokenizer, "chat_template", None) and not raw
    asked: Any = [{"role": "user", "content": text}] if chat else text
    result = decoder.generate(
        asked,
        prompt_class=prompt_class,
        strategy=strategy,
        params=dict(param) or None,
        **{
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            **_controls(control),
        },
    )
    stats = result.stats
    if as_json:
        print_json(
            {
                "text": result.text,
                "token_ids": result.token_ids,
                "finish": result.finish,
                "seed": result.seed,
                "strategy": result.choice.strategy,
                "params": dict(result.choice.params),
                "lossless": result.choice.lossless,
                "reason": result.choice.reason,
                "prompt_class": result.choice.prompt_class,
                "tokens_per_second": stats.tokens_per_second,
                "tokens_per_forward": stats.tokens_per_forward,
                "acceptance": stats.acceptance,
                "seconds": {
                    "classifying": result.seconds_classifying,
                    "prefill": stats.seconds_prefill,
                    "target": stats.seconds_target,
                    "draft": stats.seconds_draft,
                    "rest": stats.seconds_rest,
                },
            }
        )
        return
    click.echo(result.text)
    lossy = "" if result.choice.lossless else " [LOSSY]"
    click.echo(
        f"{result.choice.strategy}{lossy} ({result.choice.reason}): "
        f"{stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_forward:.2f} tokens per target forward"
        + (
            f", class found in {result.seconds_classifying * 1000:.1f} ms"
            if result.seconds_classifying
            else ""
        )
        + (f", seed {result.seed}" if result.seed is not None else ""),
        err=True,
    )


def _controls(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Values are JSON; what isn't is a text."""
    controls: dict[str, Any] = {}
    for name, text in pairs:
        if name in ("prompt", "prompt_class", "strategy", "params"):
            raise AdaptSpecError(f"--control {name}: {name} is no generation control")
        try:
            controls[name] = json.loads(text)
        except ValueError:
            controls[name] = text
    return controls
