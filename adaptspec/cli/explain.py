"""``adaptspec explain``: what would decode a prompt, and why, without decoding it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from adaptspec.cli.generate import generate
from adaptspec.cli.output import print_json, without_loading_bars
from adaptspec.cli.texts import prompt_with_input, write
from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec.selector import Choice, Expected

# Options that mean what they mean to `generate`.
SHARED = (
    *("prompt", "model", "draft_model", "heads", "db", "prompt_class", "allow_lossy"),
    *("dtype", "device", "threads", "compile", "trust_remote_code", "adapt", "raw"),
)


def _with_options_of(
    command: click.Command, names: Sequence[str]
) -> Callable[[click.Command], click.Command]:
    """Gives a command those parameters of another."""

    def give(mine: click.Command) -> click.Command:
        mine.params = [p for p in command.params if p.name in names] + mine.params
        return mine

    return give


@_with_options_of(generate, SHARED)
@click.command()
@click.option("--prompt", "named", help="The same as PROMPT.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def explain(
    host: Host,
    prompt: str | None,
    named: str | None,
    model: str | None,
    draft_model: str | None,
    heads: tuple[str, ...],
    db: str | None,
    prompt_class: str | None,
    allow_lossy: bool,
    dtype: str,
    device: str | None,
    threads: int | None,
    compile: bool,
    trust_remote_code: bool,
    adapt: bool,
    raw: bool,
    as_json: bool,
) -> None:
    """Say what `generate` would decode PROMPT with, and why; nothing is decoded.

    Without PROMPT, what it would decode a prompt of the class with.
    """
    if prompt is not None and named is not None:
        raise AdaptSpecError("--prompt is PROMPT by another name; give one of them")
    prompt = named if prompt is None else prompt
    text = None if prompt is None else prompt_with_input(prompt)
    from adaptspec.decoder import load
    from adaptspec.model.rounding import output_note

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if model is None:
        from adaptspec.default_model import default_model_path

        model = str(default_model_path(lambda line: click.echo(line, err=True)))
    with without_loading_bars():
        decoder = load(
            model,
            draft_model,
            db,
            dtype=dtype,
            device=device,
            host=host,
            heads=heads,
            allow_lossy=allow_lossy,
            compile=compile,
            trust_remote_code=trust_remote_code,
            adapt=adapt,
        )
    told = None
    if text is not None and prompt_class is None:
        told = decoder.classify(text, raw=raw)
    choice = decoder.choose(prompt_class if told is None else told.prompt_class)
    if told is not None:
        choice = replace(choice, reason=f"{told.reason}; {choice.reason}")
    found = explained(choice) | {"output": output_note(decoder.model.rounding)}
    shapes = decoder.model.shapes
    found["shapes"] = asdict(shapes)
    if as_json:
        print_json(found)
        return
    rows = {
        "class": found["class"] or "none",
        "strategy": found["strategy"] + ("" if choice.lossless else " (LOSSY)"),
        "parameters": " ".join(f"{k}={v}" for k, v in found["params"].items())
        or "none",
        "reason": choice.reason,
        "expected": expected_speed(choice.expected),
        "output": found["output"],
        "shapes": shapes.kind + (f" ({shapes.reason})" if shapes.reason else ""),
    }
    write("".join(f"{name + ':':<12}{value}\n" for name, value in rows.items()))


def explained(choice: Choice) -> dict[str, Any]:
    """A choice and what was measured of it; None where nothing was."""
    return {
        "class": choice.prompt_class,
        "strategy": choice.strategy,
        "params": dict(choice.params),
        "lossless": choice.lossless,
        "reason": choice.reason,
        "expected": choice.expected and asdict(choice.expected),
    }


def expected_speed(expected: Expected | None) -> str:
    """In words."""
    if expected is None:
        return "not measured here"
    interval = ""
    if expected.low is not None and expected.high is not None:
        interval = f" ({expected.low:.2f} to {expected.high:.2f})"
    prompts = expected.prompts
    return (
        f"{expected.ratio:.2f}x plain decoding{interval}, "
        f"{expected.tokens_per_second:.1f} tokens/s "
        f"({prompts} prompt{'' if prompts == 1 else 's'})"
    )
