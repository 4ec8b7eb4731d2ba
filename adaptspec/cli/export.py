"""``adaptspec export``: a model directory that decodes through AdaptSpec, or flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptspec.cli.exporting import FLAGS, FORMATS, Shown, mix_of, show
from adaptspec.cli.output import without_loading_bars
from adaptspec.cli.texts import write
from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.host import Host

# Which of the options are for one of the two forms alone.
OF_DIRECTORIES = ("copy", "force", "trust_remote_code")
OF_ENGINES = (
    *("form", "prompt_class", "mix", "split", "table", "run", "concurrency", "host"),
    *("port", "image", "engine_command", "engine_python"),
)


@click.command()
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path)
)
@click.option(
    "-m",
    "--model",
    help="Model folder; default: the embedded model, with --for the one tuned.",
)
@click.option("--draft-model", help="Draft model folder.")
@click.option(
    "--heads", multiple=True, metavar="DIR", help="Heads trained for the model."
)
@click.option("--db", help="Profile database: path or SQLAlchemy URL.")
@click.option(
    "--copy",
    is_flag=True,
    help="DIR: copy models, heads and profiles into it, so that it can be moved.",
)
@click.option(
    "--force",
    is_flag=True,
    help="DIR: replace an earlier export and files of the same names in it.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="DIR: run code that comes with a model. Only for models you trust.",
)
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    help="Print how to start llama.cpp, vllm or sglang, in place of writing DIR.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default=FLAGS,
    show_default=True,
    help="--for: a command line, JSON, or a docker compose file.",
)
@click.option("--class", "prompt_class", help="--for: of this class alone.")
@click.option(
    "--mix",
    metavar="CLASS=WEIGHT",
    multiple=True,
    help="--for: a class's share of the prompts; default: as in the workload.",
)
@click.option(
    "--split",
    is_flag=True,
    help="--for: a server for each setting that a class is fastest with.",
)
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="--for --split: write the table for `adaptspec route`, as JSON or YAML.",
)
@click.option("--run", help="--for: only what this tuning run decided.")
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    help="--for: requests at a time that the server will have.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="--for: what servers listen on.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="--for: the first server's; default: 8000, with --split 8001.",
)
@click.option("--image", help="--for --format compose: the engine's image.")
@click.option("--engine-command", metavar="PROGRAM", help="--for: its program.")
@click.option(
    "--engine-python", metavar="PROGRAM", help="--for: Python that it is installed for."
)
@click.pass_context
def export(
    context: click.Context,
    /,
    folder: Path | None,
    engine: str | None,
    **asked: Any,
) -> None:
    """Write DIR, which transformers loads and decodes through AdaptSpec.

    from_pretrained(DIR, trust_remote_code=True).generate(...) and transformers serve
    decode as `adaptspec generate` does, with the draft model, heads and profiles given
    here. DIR holds links to the model's files unless --copy is given.

    With --for ENGINE, print how that engine is started with what `adaptspec tune
    --engine ENGINE` found; what isn't given is as it was tuned.
    """
    if (folder is None) == (engine is None):
        raise AdaptSpecError(
            "give either DIR, to write a model directory, or --for ENGINE, to print "
            "how an engine is started"
        )
    _refuse_others(context, OF_DIRECTORIES if folder is None else OF_ENGINES)
    if engine is not None:
        _print_for(context.obj, engine, **asked)
    elif folder is not None:
        _write_directory(context.obj, folder, **asked)


def _refuse_others(context: click.Context, names: tuple[str, ...]) -> None:
    """Refuse options of the other form, which would be ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not click.core.ParameterSource.DEFAULT:
            other = "with --for" if names == OF_DIRECTORIES else "with DIR"
            raise AdaptSpecError(
                f"{parameter.opts[-1]} says nothing {other}; leave it out"
            )


def _print_for(
    plugins: Host,
    engine: str,
    *,
    model: str | None,
    draft_model: str | None,
    heads: tuple[str, ...],
    db: str | None,
    form: str,
    prompt_class: str | None,
    mix: tuple[str, ...],
    split: bool,
    table: Path | None,
    run: str | None,
    concurrency: int | None,
    host: str,
    port: int | None,
    image: str | None,
    engine_command: str | None,
    engine_python: str | None,
    **others: Any,
) -> None:
    if prompt_class is not None and (split or mix):
        raise AdaptSpecError(
            "--class is about one class, --split and --mix are about all of them; "
            "leave one out"
        )
    if table is not None and not split:
        raise AdaptSpecError("--table is written with --split; add it")
    if image is not None and form != "compose":
        raise AdaptSpecError("--image is for --format compose; add it")
    from adaptspec.engines.exporting.export import Wanted
    from adaptspec.engines.exporting.options import Asked

    first = port if port is not None else 8001 if split else 8000
    wanted = Wanted(
        Asked(model, draft_model, heads, engine_command, engine_python, concurrency),
        prompt_class,
        mix_of(mix),
        split,
        first,
        run,
    )
    show(engine, wanted, Shown(form, host, table, image), plugins, db)


def _write_directory(
    plugins: Host,
    folder: Path,
    *,
    model: str | None,
    draft_model: str | None,
    heads: tuple[str, ...],
    db: str | None,
    copy: bool,
    force: bool,
    trust_remote_code: bool,
    **others: Any,
) -> None:
    from adaptspec.drop_in.directory import export_directory

    if model is None:
        from adaptspec.default_model import default_model_path

        model = str(default_model_path(lambda line: click.echo(line, err=True)))
    with without_loading_bars():
        settings, profiles = export_directory(
            folder,
            model,
            draft_model,
            heads,
            db,
            host=plugins,
            copy=copy,
            force=force,
            trust_remote_code=trust_remote_code,
        )
    if not profiles:
        click.echo(
            "no profiles of this model yet: decoding is plain until `adaptspec tune "
            f"--model {model}{'' if db is None else f' --db {db}'}` "
            + ("has measured some and DIR is written again" if copy else "measures"),
            err=True,
        )
    write(
        f"{folder}: model {'copied' if copy else 'linked'}, "
        f"draft model {settings.draft_model or 'none'}, "
        f"heads {', '.join(settings.heads) or 'none'}, "
        f"{profiles} profile{'' if profiles == 1 else 's'} in "
        f"{settings.db or 'the database of the user that runs it'}\n"
    )
