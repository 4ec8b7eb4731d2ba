"""Environments name the trained heads that are attached to the target."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from adaptspec_profiles.schema import text

revision = "m002"
down_revision = "m001"


def upgrade() -> None:
    """Add the columns; what was measured before had no heads."""
    op.add_column("environments", sa.Column("heads", text(64)))
    op.add_column("environments", sa.Column("heads_name", sa.String()))
