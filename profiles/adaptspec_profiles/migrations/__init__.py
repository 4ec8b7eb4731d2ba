"""Alembic steps, run in one transaction from the installed package."""

from __future__ import annotations

from pathlib import Path

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from adaptspec.errors import ProfileStoreError
from adaptspec_profiles.engine import reading, safe_url

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
    known = [step.revision for step in script.walk_revisions()][::-1]
    last = len(known) if target == "head" else known.index(target) + 1
    done: list[str] = []
    while True:
        current = _current(engine)
        if current is not None and current not in known:
            url = safe_url(engine.url.render_as_string(hide_password=True))
            raise ProfileStoreError(
                f"the profile database {url} is at step {current!r}, newer than this "
                f"adaptspec knows (last: {known[-1]!r}); upgrade adaptspec or "
                "give another --db"
            )
        upcoming = 0 if current is None else known.index(current) + 1
        if upcoming >= last:
            return done
        if _step(engine, script, current, known[upcoming]):
            done.append(known[upcoming])


def _current(engine: Engine) -> str | None:
    with reading(engine).begin() as connection:
        return revision(connection)


def _step(
    engine: Engine, script: ScriptDirectory, current: str | None, upcoming: str
) -> bool:
    """Run the step after ``current``; False if another process did meanwhile."""
    try:
        with engine.begin() as connection:
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE}
            )
            if context.get_current_revision() != current:
                return False
            context._ensure_version_table()
            with Operations.context(context):
                script.get_revision(upcoming).module.upgrade()
            stamp = (
                f"INSERT INTO {VERSION_TABLE} (version_num) VALUES ('{upcoming}')"
                if current is None
                else f"UPDATE {VERSION_TABLE} SET version_num = '{upcoming}'"
            )
            connection.exec_driver_sql(stamp)
            return True
    except (OperationalError, ProgrammingError, IntegrityError):
        # Where transactions don't wait for each other, both have tried this step.
        if _current(engine) == current:
            raise
        return False
