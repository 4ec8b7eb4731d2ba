"""Removes the parameter ``gate`` from stored settings: the guard took its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from adaptspec_profiles.migrations.settings import change_settings, loaded, update
from adaptspec_profiles.renamed import without_gate

revision = "m004"
down_revision = "m003"


def upgrade() -> None:
    """Leave the parameter ``gate`` out, in our studies of Optuna's too, if any."""
    change_settings(without_gate)
    tables = sa.inspect(op.get_bind()).get_table_names()
    if "trial_params" not in tables:
        return
    attributes = _table("trial_user_attributes")
    # Others' studies may share the database.
    ours = sa.select(attributes.c.trial_id).where(attributes.c.key == "setting")
    found = [row.trial_id for row in op.get_bind().execute(ours).all()]
    params = sa.table("trial_params", *map(sa.column, ("trial_id", "param_name")))
    gates = sa.and_(params.c.trial_id.in_(found), params.c.param_name == "gate")
    op.execute(params.delete().where(gates))
    _change_attributes(attributes, found)
    _change_attributes(_table("trial_system_attributes"), found)


def _table(name: str) -> sa.TableClause:
    return sa.table(name, *map(sa.column, ("trial_id", "key", "value_json")))


def _change_attributes(table: sa.TableClause, trials: Sequence[int]) -> None:
    """What a trial was asked for, is, and came to."""
    keys = ("setting", "result", "fixed_params")
    asked = sa.and_(table.c.key.in_(keys), table.c.trial_id.in_(trials))
    for row in op.get_bind().execute(sa.select(table).where(asked)).all():
        old: Any = loaded(row.value_json)
        new = without_gate(None, old)
        if row.key == "result" and isinstance(old, dict):
            new = {**old, "params": without_gate(None, old.get("params"))}
        this = sa.and_(table.c.trial_id == row.trial_id, table.c.key == row.key)
        if new != old:
            update(table, "value_json", None, json.dumps(new), this, sa.Text())
