"""Environments, profiles, trials and records."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adaptspec_profiles.schema import text

revision = "m001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "environments",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("digest", text(64), nullable=False, unique=True),
        sa.Column("model", text(64), nullable=False),
        sa.Column("model_name", sa.String(), nullable=False),
        sa.Column("draft", text(64)),
        sa.Column("draft_name", sa.String()),
        sa.Column("dtype", text(32), nullable=False),
        sa.Column("device", text(32), nullable=False),
        sa.Column("device_name", sa.String(), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
    )
    op.create_index("ix_environments_model", "environments", ["model"])
    op.create_table(
        "profiles",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column(
            "environment_id",
            sa.Integer(),
            sa.ForeignKey("environments.id"),
            nullable=False,
        ),
        sa.Column("run", text(64), nullable=False),
        sa.Column("workload", text(64), nullable=False),
        sa.Column("workload_name", sa.String(), nullable=False),
        sa.Column("prompt_class", sa.String(), nullable=False),
        sa.Column("strategy", sa.String(), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("lossless", sa.Boolean(), nullable=False),
        sa.Column("baseline", sa.Boolean(), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("tokens_per_second", sa.Float(), nullable=False),
        sa.Column("ratio", sa.Float(), nullable=False),
        sa.Column("measurement", sa.JSON(), nullable=False),
        sa.UniqueConstraint(
            "run", "prompt_class", "strategy", "baseline", name="uq_profiles_setting"
        ),
    )
    op.create_index("ix_profiles_run", "profiles", ["run"])
    op.create_table(
        "tuning_trials",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("run", text(64), nullable=False),
        sa.Column("prompt_class", sa.String(), nullable=False),
        sa.Column("strategy", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("params", sa.JSON(), nullable=False),
        sa.Column("state", text(16), nullable=False),
        sa.Column("value", sa.Float()),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.UniqueConstraint(
            "run", "prompt_class", "strategy", "number", name="uq_tuning_trials_number"
        ),
    )
    op.create_table(
        "tuning_records",
        sa.Column("run", text(64), primary_key=True),
        sa.Column("key", text(128), primary_key=True),
        sa.Column("value", sa.JSON(), nullable=False),
    )
