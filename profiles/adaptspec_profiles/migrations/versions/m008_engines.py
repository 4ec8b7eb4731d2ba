"""Says of each environment which engine decoded, and how many requests at a time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adaptspec.profile import OURS
from adaptspec_profiles.schema import text

revision = "m008"
down_revision = "m007"


def upgrade() -> None:
    """Add both; what was measured before was ours, one request at a time."""
    op.add_column(
        "environments",
        sa.Column("engine", text(64), nullable=False, server_default=OURS),
    )
    op.add_column(
        "environments",
        sa.Column("concurrency", sa.Integer(), nullable=False, server_default="1"),
    )
