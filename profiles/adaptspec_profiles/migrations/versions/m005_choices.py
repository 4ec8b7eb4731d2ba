"""Adds the table of choices; a class may have several settings of a strategy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from adaptspec.errors import ProfileStoreError
from adaptspec_profiles.as_json import json_value, profile_from_json, setting_digest
from adaptspec_profiles.older import choices_of
from adaptspec_profiles.schema import text

revision = "m005"
down_revision = "m004"

KEY = ("configuration", "kernel", "attention")


def upgrade() -> None:
    """Add the table and columns, and decide on what was measured before."""
    for name in KEY:
        op.add_column("environments", sa.Column(name, text(64)))
    op.add_column("profiles", sa.Column("setting", text(64)))
    profiles = sa.table("profiles", *map(sa.column, ("id", "params", "setting")))
    for row in op.get_bind().execute(sa.select(profiles)).all():
        # One that is damaged gets a name of its own; whoever reads it says so.
        params = _loaded(row.params)
        named = isinstance(params, dict)
        digest = setting_digest(params) if named else f"damaged {row.id}"
        here = profiles.c.id == row.id
        op.execute(profiles.update().where(here).values(setting=digest))
    # On SQLite the table is made anew, and never gives an id twice from here on.
    kept = {"sqlite_autoincrement": True}
    with op.batch_alter_table("profiles", table_kwargs=kept) as batch:
        batch.alter_column("setting", existing_type=text(64), nullable=False)
        batch.drop_constraint("uq_profiles_setting", type_="unique")
        batch.create_unique_constraint(
            "uq_profiles_setting",
            ["run", "prompt_class", "strategy", "setting", "baseline"],
        )
    op.create_table(
        "choices",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column(
            "environment_id",
            sa.Integer(),
            sa.ForeignKey("environments.id"),
            nullable=False,
        ),
        sa.Column("run", text(64), nullable=False),
        sa.Column("prompt_class", sa.String(), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("picks", sa.JSON(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("prompts", sa.Integer(), nullable=False),
        sa.Column("tried", sa.JSON(), nullable=False),
        sa.Column("objective", text(32), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.UniqueConstraint("run", "prompt_class", name="uq_choices_class"),
    )
    op.create_index("ix_choices_run", "choices", ["run"])
    _decide()


def _decide() -> None:
    """A choice for every run and class whose profiles can be read."""
    bind = op.get_bind()
    places = {row.id: row._mapping for row in _rows("environments", PLACE)}
    found, place_of = [], {}
    for row in _rows("profiles", PROFILE):
        try:
            profile = profile_from_json(_record(row._mapping, places))
        except (ProfileStoreError, ValueError, KeyError, TypeError):
            continue  # damaged: whoever reads it says so
        found.append(profile)
        place_of[profile.run, profile.prompt_class] = row.environment_id
    tables = sa.MetaData()
    tables.reflect(bind, only=["choices"])
    for choice in choices_of(found):
        bind.execute(
            tables.tables["choices"].insert(),
            {
                "environment_id": place_of[choice.run, choice.prompt_class],
                "run": choice.run,
                "prompt_class": choice.prompt_class,
                "created": choice.created.replace(tzinfo=None),
                "picks": json_value(choice.picks),
                "reason": choice.reason,
                "prompts": choice.prompts,
                "tried": list(choice.tried),
                "objective": choice.objective,
                "pinned": False,
            },
        )


PLACE = (
    *("id", "model", "model_name", "draft", "draft_name", "dtype", "device"),
    *("device_name", "threads", "versions", "heads", "heads_name", *KEY),
)
PROFILE = (
    *("environment_id", "run", "workload", "workload_name", "prompt_class", "strategy"),
    *("params", "lossless", "baseline", "created", "measurement"),
)


def _rows(table: str, columns: Sequence[str]) -> Sequence[Any]:
    """Without types: a value that is no JSON must not stop the step."""
    asked = sa.select(sa.table(table, *map(sa.column, columns)))
    return op.get_bind().execute(asked).all()


def _record(row: Any, places: Mapping[int, Any]) -> dict[str, Any]:
    """A profile's row as its JSON record."""
    place = {k: v for k, v in places[row["environment_id"]].items() if k != "id"}
    own = {k: v for k, v in row.items() if k != "environment_id"}
    return {
        **own,
        "environment": {**place, "versions": _loaded(place["versions"])},
        "params": _loaded(own["params"]),
        "measurement": _loaded(own["measurement"]),
        "lossless": bool(own["lossless"]),
        "baseline": bool(own["baseline"]),
        "created": f"{own['created']}+00:00".replace(" ", "T"),
    }


def _loaded(value: Any) -> Any:
    """What a column holds: SQLite gives its text. None where that is no JSON."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None
