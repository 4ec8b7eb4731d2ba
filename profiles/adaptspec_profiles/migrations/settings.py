"""Helpers of migrations that change the parameters of all stored settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

# Strategy, its parameters as they are -> as they shall be.
Change = Callable[[object, Any], Any]


def change_settings(change: Change) -> None:
    """Change parameters in profiles, trials and a report's records.

    Values that are no JSON stay as they are: whoever reads them says so.
    """
    for name in ("profiles", "tuning_trials"):
        table = sa.table(name, *map(sa.column, ("id", "strategy", "params")))
        for row in op.get_bind().execute(sa.select(table)).all():
            params = loaded(row.params)
            changed = change(row.strategy, params)
            update(table, "params", params, changed, table.c.id == row.id)
    table = sa.table("tuning_records", *map(sa.column, ("run", "key", "value")))
    for row in op.get_bind().execute(sa.select(table)).all():
        kind, strategy = row.key.split("/")[0], row.key.rsplit("/", 1)[-1]
        value = changed = loaded(row.value)
        if kind in ("predicted", "confirm"):
            changed = _keys_changed(value, change)
        elif kind == "replayed" and isinstance(value, dict):
            trials = [
                {**trial, "params": change(strategy, trial.get("params"))}
                for trial in value.get("trials", [])
            ]
            changed = {**value, "trials": trials}
        this = sa.and_(table.c.run == row.run, table.c.key == row.key)
        update(table, "value", value, changed, this)


def loaded(value: Any) -> Any:
    """What a column holds: SQLite gives its text. None where that is no JSON."""
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def update(
    table: sa.TableClause,
    column: str,
    old: Any,
    new: Any,
    where: sa.ColumnElement[bool],
    kind: sa.types.TypeEngine[Any] | None = None,
) -> None:
    """Set a column where that changes it."""
    if new is not None and new != old:
        typed = sa.bindparam("value", new, type_=kind or sa.JSON())
        op.execute(table.update().where(where).values({column: typed}))


def _keys_changed(value: Any, change: Change) -> Any:
    """The record with the settings, which are keys as JSON, changed."""
    if not isinstance(value, dict):
        return value
    found = {}
    for key, inner in value.items():
        setting = loaded(key)
        if isinstance(setting, list) and len(setting) == 2:
            strategy, params = setting
            key = json.dumps([strategy, change(strategy, params)], sort_keys=True)
        found[key] = _keys_changed(inner, change)
    return found
