"""What several strategies call by several names has one."""

from __future__ import annotations

from adaptspec_profiles.migrations.settings import change_settings
from adaptspec_profiles.renamed import renamed

revision = "m003"
down_revision = "m002"


def upgrade() -> None:
    """Rename parameters wherever settings are stored."""
    change_settings(renamed)
