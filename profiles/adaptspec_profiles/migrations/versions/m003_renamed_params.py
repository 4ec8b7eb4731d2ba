"""What several strategies call by several names has one."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

from adaptspec_profiles.renamed import RENAMED, renamed

revision = "m003"
down_revision = "m002"


def upgrade() -> None:
    """Rename parameters in profiles, trials and a report's records.

    Values that are no JSON stay as they are: whoever reads them says so.
    """
    for name in ("profiles", "tuning_trials"):
        table = sa.table(name, *map(sa.column, ("id", "strategy", "params")))
        asked = sa.select(table).where(table.c.strategy.in_(RENAMED))
        for row in op.get_bind().execute(asked).all():
            params = renamed(row.strategy, _loaded(row.params))
            _update(table, "params", params, table.c.id == row.id)
    table = sa.table("tuning_records", *map(sa.column, ("run", "key", "value")))
    for row in op.get_bind().execute(sa.select(table)).all():
        kind, strategy = row.key.split("/")[0], row.key.rsplit("/", 1)[-1]
        value = _loaded(row.value)
        if kind in ("predicted", "confirm"):
            value = _settings_renamed(value)
        elif kind == "replayed" and isinstance(value, dict):
            trials = [
                {**trial, "params": renamed(strategy, trial.get("params"))}
                for trial in value.get("trials", [])
            ]
            value = {**value, "trials": trials}
        else:
            continue
        this = sa.and_(table.c.run == row.run, table.c.key == row.key)
        _update(table, "value", value, this)


def _settings_renamed(value: Any) -> Any:
    """The record with the settings, which are keys as JSON, renamed."""
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        setting = _loaded(key)
        if isinstance(setting, list) and len(setting) == 2:
            strategy, params = setting
            key = json.dumps([strategy, renamed(strategy, params)], sort_keys=True)
        found[key] = _settings_renamed(inner)
    return found


def _loaded(value: Any) -> Any:
    """What a column holds: SQLite gives its text. None where that is no JSON."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def _update(
    table: sa.TableClause, column: str, value: Any, where: sa.ColumnElement[bool]
) -> None:
    if value is not None:
        typed = sa.bindparam("value", value, type_=sa.JSON())
        op.execute(table.update().where(where).values({column: typed}))
