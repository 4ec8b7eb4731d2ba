"""Alembic steps, run in one transaction from the installed package."""

from __future__ import annotations

from pathlib import Path

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from adaptspec.errors import ProfileStoreError

# Optuna keeps `alembic_version` in the same database.
VERSION_TABLE = "adaptspec_version"


def script_directory() -> ScriptDirectory:
    """The steps there are."""
    return ScriptDirectory(str(Path(__file__).parent))


def revision(connection: Connection) -> str | None:
    """The last step done."""
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE}
    )
    return context.get_current_revision()


def migrate(
    engine: Engine, target: str = "head", script: ScriptDirectory | None = None
) -> list[str]:
    """Run the missing steps up to ``target``, each in its own transaction.

    Returns:
        The steps done, oldest first.

    Raises:
        ProfileStoreError: if the database is newer than this code.
    """
    script = script or script_directory()
    done: list[str] = []
    while (step := _step(engine, script, target)) is not None:
        done.append(step)
    return done


def _step(engine: Engine, script: ScriptDirectory, target: str) -> str | None:
    """Run the next step; None if there is none."""
    goal = script.get_current_head() if target == "head" else target
    try:
        with engine.begin() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE}
            )
            current = context.get_current_revision()
            known = [s.revision for s in script.walk_revisions()][::-1]
            if current is not None and current not in known:
                raise ProfileStoreError(
                    f"the profile database is at step {current!r}, newer than this "
                    f"adaptspec knows (last: {known[-1]!r}); upgrade adaptspec or "
                    "give another --db"
                )
            if current == goal:
                return None
            upcoming = known[0 if current is None else known.index(current) + 1]
            module = script.get_revision(upcoming).module
            context._ensure_version_table()
            with Operations.context(context):
                module.upgrade()
            stamp = (
                f"INSERT INTO {VERSION_TABLE} (version_num) VALUES ('{upcoming}')"
                if current is None
                else f"UPDATE {VERSION_TABLE} SET version_num = '{upcoming}'"
            )
            connection.exec_driver_sql(stamp)
            return upcoming
    except (OperationalError, ProgrammingError, IntegrityError):
        # Another process may have done this very step meanwhile; then go on from there.
        with engine.begin() as connection:
            if revision(connection) == current:
                raise
        return upcoming
