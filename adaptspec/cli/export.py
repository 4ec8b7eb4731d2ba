"""``adaptspec export``: a model directory that decodes through AdaptSpec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adaptspec.cli.output import without_loading_bars
from adaptspec.cli.texts import write

if TYPE_CHECKING:
    from adaptspec.host import Host


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-m", "--model", help="Model folder; default: the embedded model.")
@click.option("--draft-model", help="Draft model folder.")
@click.option(
    "--heads", multiple=True, metavar="DIR", help="Heads trained for the model."
)
@click.option("--db", help="Profile database: path or SQLAlchemy URL.")
@click.option(
    "--copy",
    is_flag=True,
    help="Copy models, heads and profiles into DIR, so that it can be moved.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace an earlier export and files of the same names in DIR.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that comes with a model. Only for models you trust.",
)
@click.pass_obj
def export(
    host: Host,
    folder: Path,
    model: str | None,
    draft_model: str | None,
    heads: tuple[str, ...],
    db: str | None,
    copy: bool,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Write DIR, which transformers loads and decodes through AdaptSpec.

    from_pretrained(DIR, trust_remote_code=True).generate(...) and transformers serve
    decode as `adaptspec generate` does, with the draft model, heads and profiles given
    here. DIR holds links to the model's files unless --copy is given.
    """
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
            host=host,
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
