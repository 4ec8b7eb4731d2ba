"""Adds the table of what requests took with each profile's setting."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adaptspec_profiles.schema import text

revision = "m006"
down_revision = "m005"


def upgrade() -> None:
    """Create the table; nothing was recorded before."""
    op.create_table(
        "uses",
        sa.Column(
            "profile_id", sa.Integer(), sa.ForeignKey("profiles.id"), primary_key=True
        ),
        sa.Column("prompt_class", text(256), primary_key=True),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("forwards", sa.BigInteger(), nullable=False),
        sa.Column("proposed", sa.BigInteger(), nullable=False),
        sa.Column("accepted", sa.BigInteger(), nullable=False),
        sa.Column("seconds_prefill", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("log_seconds", sa.Float(), nullable=False),
        sa.Column("log_seconds_squared", sa.Float(), nullable=False),
    )
