"""The store on SQLite, or any other database SQLAlchemy speaks to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine, delete, func, inspect, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from adaptspec.errors import ProfileStoreError
from adaptspec.profile import Environment, Measurement, Profile, Trial
from adaptspec_profiles.convert import (
    LARGEST_INTEGER,
    environment_digest,
    json_value,
    same_profile,
    same_trial,
)
from adaptspec_profiles.engine import beside, make_engine, reading, safe_url
from adaptspec_profiles.migrations import migrate
from adaptspec_profiles.schema import EnvironmentRow, ProfileRow, RecordRow, TrialRow

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

T = TypeVar("T")
RACES = 10  # lost to other writers, before it counts as a failure


class SqlStore:
    """See :class:`adaptspec.profile.ProfileStore` for what each method promises.

    Args:
        url: A file path or SQLAlchemy URL; created or migrated if need be.
    """

    def __init__(self, url: str) -> None:
        self._url = safe_url(url)
        self._engine = make_engine(url)
        self._studies: RDBStorage | None = None
        try:
            migrate(self._engine)
        except SQLAlchemyError as error:
            self._engine.dispose()
            raise self._failure("open", error) from error
        except ProfileStoreError:
            self._engine.dispose()
            raise

    @property
    def folder(self) -> Path | None:
        """The folder of an SQLite file; the user's own for a server."""
        return beside(self._engine.url)

    @property
    def url(self) -> str:
        """The SQLAlchemy URL, its password hidden."""
        return self._url

    def studies(self) -> RDBStorage:
        """Optuna's storage in the same database, its tables created if need be.

        Raises:
            ProfileStoreError: if they are another version's.
        """
        from adaptspec_profiles.studies import open_studies

        if self._studies is None:
            self._studies = open_studies(self._engine.url)
        return self._studies

    def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
        """One transaction for all."""
        checked = [same_profile(profile) for profile in profiles]

        def put(session: Session) -> list[int]:
            return [_put(session, profile) for profile in checked]

        return self._write(put)

    def profiles(
        self,
        *,
        model: str | None = None,
        prompt_class: str | None = None,
        run: str | None = None,
    ) -> list[Profile]:
        """Newest first."""
        query = select(ProfileRow).join(ProfileRow.environment)
        if model is not None:
            query = query.where(EnvironmentRow.model == model)
        if prompt_class is not None:
            query = query.where(ProfileRow.prompt_class == prompt_class)
        if run is not None:
            query = query.where(ProfileRow.run == run)
        query = query.order_by(ProfileRow.created.desc(), ProfileRow.id.desc())
        with self._reading() as session:
            return [_profile(row) for row in session.scalars(query)]

    def profile(self, profile_id: int) -> Profile | None:
        """One by id."""
        if not 0 < profile_id <= LARGEST_INTEGER:
            return None
        with self._reading() as session:
            row = session.get(ProfileRow, profile_id)
            return None if row is None else _profile(row)

    def delete_run(self, run: str) -> int:
        """Profiles, trials, records and studies of a run."""
        if inspect(self._engine).has_table("studies"):
            from adaptspec_profiles.studies import delete_studies

            delete_studies(self.studies(), run)
        with self._writing() as session:
            count = session.scalar(
                select(func.count())
                .where(ProfileRow.run == run)
                .select_from(ProfileRow)
            )
            for table in (ProfileRow, TrialRow, RecordRow):
                session.execute(delete(table).where(table.run == run))
            return int(count or 0)

    def add_trial(self, trial: Trial) -> None:
        """The same number again is ignored."""
        trial = same_trial(trial)
        try:
            with self._writing() as session:
                session.add(TrialRow(**_trial_fields(trial)))
        except ProfileStoreError as error:
            repeated = isinstance(error.__cause__, IntegrityError) and any(
                _trial_key(t) == _trial_key(trial) for t in self.trials(trial.run)
            )
            if not repeated:
                raise

    def trials(self, run: str) -> list[Trial]:
        """By class, strategy and number."""
        with self._reading() as session:
            rows = session.scalars(select(TrialRow).where(TrialRow.run == run))
            found = [
                Trial(
                    row.run,
                    row.prompt_class,
                    row.strategy,
                    row.number,
                    row.params,
                    row.state,
                    row.value,
                    row.detail,
                )
                for row in rows
            ]
        # Not by the database, whose order of text may be a language's.
        return sorted(found, key=_trial_key)

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Replace an older one."""
        checked = json_value(value)
        self._write(
            lambda session: session.merge(RecordRow(run=run, key=key, value=checked))
        )

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """As it was put."""
        with self._reading() as session:
            row = session.get(RecordRow, (run, key))
            return None if row is None else dict(row.value)

    def close(self) -> None:
        """Release connections."""
        if self._studies is not None:
            from adaptspec_profiles.studies import close_studies

            close_studies(self._studies)
            self._studies = None
        self._engine.dispose()

    def _write(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in a transaction, again where another process came first.

        On a server two may find a row missing and both insert it; SQLite lets one
        writer in at a time.
        """
        for _ in range(RACES):
            try:
                with self._writing() as session:
                    return work(session)
            except ProfileStoreError as error:
                if not isinstance(error.__cause__, IntegrityError):
                    raise
        with self._writing() as session:
            return work(session)

    def _writing(self) -> AbstractContextManager[Session]:
        return self._transaction(self._engine)

    def _reading(self) -> AbstractContextManager[Session]:
        return self._transaction(reading(self._engine))

    @contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Session]:
        try:
            with Session(engine, expire_on_commit=False) as session:
                with session.begin():
                    yield session
        except SQLAlchemyError as error:
            raise self._failure("use", error) from error
        except UnicodeEncodeError as error:  # from SQLite, as it is
            raise self._failure("ask", error) from error

    def _failure(self, what: str, error: Exception) -> ProfileStoreError:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        return ProfileStoreError(
            f"can't {what} the profile database {self._url}: {reason} "
            "(--db takes a file path or a SQLAlchemy URL)"
        )


def _environment(session: Session, environment: Environment) -> EnvironmentRow:
    fields = asdict(environment)
    # Without heads as before there were any, so that older rows are found again.
    absent = {"heads", "heads_name"} if environment.heads is None else set()
    digest = environment_digest({k: v for k, v in fields.items() if k not in absent})
    row = session.scalar(select(EnvironmentRow).where(EnvironmentRow.digest == digest))
    if row is None:
        row = EnvironmentRow(digest=digest, **fields)
        session.add(row)
        session.flush()
    return row


def _put(session: Session, profile: Profile) -> int:
    """Store a profile; one of its setting keeps the id that it has."""
    environment = _environment(session, profile.environment)
    row = session.scalar(
        select(ProfileRow).where(
            ProfileRow.run == profile.run,
            ProfileRow.prompt_class == profile.prompt_class,
            ProfileRow.strategy == profile.strategy,
            ProfileRow.baseline == profile.baseline,
        )
    )
    fields = {**_profile_fields(profile), "environment": environment}
    if row is None:
        row = ProfileRow(**fields)
        session.add(row)
    else:
        for name, value in fields.items():
            setattr(row, name, value)
    session.flush()
    return row.id


def _profile_fields(profile: Profile) -> dict[str, Any]:
    return {
        "run": profile.run,
        "workload": profile.workload,
        "workload_name": profile.workload_name,
        "prompt_class": profile.prompt_class,
        "strategy": profile.strategy,
        "params": dict(profile.params),
        "lossless": profile.lossless,
        "baseline": profile.baseline,
        "created": profile.created.replace(tzinfo=None),
        "tokens_per_second": profile.measurement.tokens_per_second,
        "ratio": profile.measurement.ratio,
        "measurement": asdict(profile.measurement),
    }


def _profile(row: ProfileRow) -> Profile:
    where = row.environment
    return Profile(
        environment=Environment(
            where.model,
            where.model_name,
            where.draft,
            where.draft_name,
            where.dtype,
            where.device,
            where.device_name,
            where.threads,
            where.versions,
            where.heads,
            where.heads_name,
        ),
        workload=row.workload,
        workload_name=row.workload_name,
        prompt_class=row.prompt_class,
        strategy=row.strategy,
        params=row.params,
        measurement=Measurement(**row.measurement),
        created=row.created.replace(tzinfo=timezone.utc),
        lossless=row.lossless,
        baseline=row.baseline,
        run=row.run,
        id=row.id,
    )


def _trial_key(trial: Trial) -> tuple[str, str, str, int]:
    return (trial.run, trial.prompt_class, trial.strategy, trial.number)


def _trial_fields(trial: Trial) -> dict[str, Any]:
    return {
        "run": trial.run,
        "prompt_class": trial.prompt_class,
        "strategy": trial.strategy,
        "number": trial.number,
        "params": dict(trial.params),
        "state": trial.state,
        "value": trial.value,
        "detail": dict(trial.detail),
    }
