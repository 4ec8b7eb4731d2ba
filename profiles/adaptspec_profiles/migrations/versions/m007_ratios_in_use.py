"""Keeps how requests compare with plain decoding, not their seconds' logarithms."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "m007"
down_revision = "m006"


def upgrade() -> None:
    """Change the columns; the ratios of what was recorded before aren't known."""
    with op.batch_alter_table("uses") as batch:
        batch.drop_column("log_seconds")
        batch.drop_column("log_seconds_squared")
        for name in ("log_ratio", "log_ratio_squared", "weight"):
            batch.add_column(sa.Column(name, sa.Float()))
    op.execute("UPDATE uses SET log_ratio = 0, log_ratio_squared = 0, weight = 0")
    with op.batch_alter_table("uses") as batch:
        for name in ("log_ratio", "log_ratio_squared", "weight"):
            batch.alter_column(name, existing_type=sa.Float(), nullable=False)
