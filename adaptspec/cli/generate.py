"""``adaptspec generate``: decode one prompt with the profiled or a given strategy."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adaptspec.cli.output import print_json, without_loading_bars
from adaptspec.cli.texts import argument_text, file_text, prompt_with_input, write
from adaptspec.errors import AdaptSpecError
from adaptspec.host import Host

# Arguments of ``Decoder.stream`` that say what is decoded, and with what.
NO_CONTROLS = (
    "prompt",
    "prompt_class",
    "strategy",
    "params",
    "raw",
    "tools",
    "template_arguments",
    "shadow",
)

if TYPE_CHECKING:
    from adaptspec.shadow import Shadow
    from adaptspec.streaming.stream import Result, Stream


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
    help="Also choose among strategies that change sampled output.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Default: the model's configuration, else 128.",
)
@click.option("-t", "--temperature", type=float, help="0 is greedy.")
@click.option("--top-k", type=int, help="Sample from this many likeliest tokens.")
@click.option(
    "--top-p", type=float, help="Sample from the likeliest tokens of this probability."
)
@click.option("--seed", type=int, help="Seed of sampling; default: random, printed.")
@click.option(
    "-c",
    "--control",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Any other generation control; VALUE is JSON, null is off.",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End the output before this text; may be given several times.",
)
@click.option(
    "--json-schema", metavar="FILE", help="The output is JSON of the schema in FILE."
)
@click.option(
    "--regex", metavar="TEXT", help="The output matches this regular expression."
)
@click.option(
    "--grammar",
    metavar="FILE",
    help="The output is in FILE's GBNF or Lark grammar.",
)
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="auto: as the weights are stored.",
)
@click.option("--device", help="Default: CUDA if there is one, else the CPU.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.")
@click.option(
    "--compile",
    is_flag=True,
    help="Run norms and MLPs as torch.compile makes them; the first time waits.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that comes with a model. Only for models you trust.",
)
@click.option(
    "--learn",
    is_flag=True,
    help="Keep what strategies learn beside the profiles; it may hold outputs' tokens.",
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Add tokens and seconds, no text, to what the profile saw in use.",
)
@click.option(
    "--shadow",
    is_flag=True,
    help="Decode plainly; say what strategies would have saved.",
)
@click.option(
    "--adapt/--no-adapt",
    default=True,
    show_default=True,
    help="Let the choice follow what requests took, or take what was tuned.",
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
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    control: tuple[tuple[str, str], ...],
    stop: tuple[str, ...],
    json_schema: str | None,
    regex: str | None,
    grammar: str | None,
    system: str | None,
    dtype: str,
    device: str | None,
    threads: int | None,
    compile: bool,
    trust_remote_code: bool,
    learn: bool,
    record: bool,
    shadow: bool,
    adapt: bool,
    raw: bool,
    as_json: bool,
) -> None:
    """Decode PROMPT; text to stdout as it comes, figures to stderr.

    Text that is piped in comes before PROMPT, with an empty line between them. Without
    PROMPT, or where it is -, standard input is the prompt. It is a user's message where
    the model has a chat template.
    """
    text = prompt_with_input(prompt)
    if param and strategy is None:
        raise AdaptSpecError("--param needs --strategy")
    if system is not None and raw:
        raise AdaptSpecError("--system needs the chat template; leave out --raw")
    stops = [argument_text(each, "--stop") for each in stop]
    named: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop_strings": stops or None,
        "json_schema": file_text(json_schema, "--json-schema"),
        "regex": None if regex is None else argument_text(regex, "--regex"),
        "grammar": file_text(grammar, "--grammar"),
    }
    controls = _controls(control, named)
    asked: Any = text
    if system is not None:
        content = argument_text(system, "--system")
        asked = [
            {"role": "system", "content": content},
            {"role": "user", "content": text},
        ]
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
            device=device,
            threads=threads,
            compile=compile,
            host=host,
            learn=learn,
            heads=heads,
            allow_lossy=allow_lossy,
            trust_remote_code=trust_remote_code,
            record=record,
            adapt=adapt,
        )
    stream = decoder.stream(
        asked,
        prompt_class=prompt_class,
        strategy=strategy,
        params=dict(param) or None,
        shadow=shadow,
        raw=raw,
        **{name: value for name, value in named.items() if value is not None},
        **controls,
    )
    try:
        with stream:
            whole = _shown(stream, silent=as_json)
    finally:
        if stream.result.token_ids and not as_json:
            write("\n")
    if as_json:
        print_json(_as_json(stream.result))
    else:
        click.echo(_figures(stream.result), err=True)
    if not whole:
        sys.exit(130)


def _shown(stream: Stream, silent: bool) -> bool:
    """Print the text as it comes; False if Ctrl-C ended it."""
    whole = True
    while True:
        try:
            piece = next(stream, None)
            if piece is None:
                return whole
            if not silent:
                write(piece)
        except KeyboardInterrupt:
            whole = False
            stream.close()  # what was held back is still to be read


def _as_json(result: Result) -> dict[str, Any]:
    stats = result.stats
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish": result.finish,
        "seed": result.seed,
        "strategy": result.choice.strategy,
        "params": dict(result.choice.params),
        "lossless": result.choice.lossless,
        "reason": result.choice.reason,
        "prompt_class": result.choice.prompt_class,
        "expected": result.choice.expected and asdict(result.choice.expected),
        "ratio": stats.ratio,
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
        "shadows": [asdict(shadow) for shadow in result.shadows],
    }


def _figures(result: Result) -> str:
    stats = result.stats
    lossy = "" if result.choice.lossless else " [LOSSY]"
    return (
        f"{result.choice.strategy}{lossy} ({result.choice.reason}): "
        f"{stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_forward:.2f} tokens per target forward"
        + (
            f", class told in {result.seconds_classifying * 1000:.1f} ms"
            if result.seconds_classifying
            else ""
        )
        + (f", seed {result.seed}" if result.seed is not None else "")
        + "".join(map(_shadow_line, result.shadows))
    )


def _shadow_line(shadow: Shadow) -> str:
    """What one strategy would have saved, on a line of its own."""
    costs = "" if shadow.costs_known else " if larger forwards cost nothing more"
    ratio = "" if shadow.ratio is None else f", about {shadow.ratio:.2f}x plain{costs}"
    taken = f"{shadow.tokens_per_forward:.2f} tokens per target forward"
    accepted = f"{shadow.accepted} of {shadow.proposed} candidates accepted"
    return f"\n  {shadow.strategy} would have made {taken} ({accepted}){ratio}"


def _controls(
    pairs: Sequence[tuple[str, str]], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Values are JSON; what isn't is a text.

    Args:
        named: Values of the controls that have options of their own.
    """
    controls: dict[str, Any] = {}
    for name, text in pairs:
        if named.get(name) is not None:
            raise AdaptSpecError(f"--control {name}: its own option is given, too")
        if name in NO_CONTROLS:
            raise AdaptSpecError(f"--control {name}: {name} is no generation control")
        try:
            controls[name] = json.loads(text)
        except ValueError:
            controls[name] = text
    return controls
