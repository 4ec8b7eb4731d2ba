"""The store on SQLite, or any other database SQLAlchemy speaks to."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alembic.util import CommandError
from sqlalchemy import (
    ColumnElement,
    Engine,
    Select,
    and_,
    delete,
    func,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from adaptspec.errors import ProfileStoreError, StoreWarning
from adaptspec.profile import (
    FADING,
    OURS,
    ClassChoice,
    Environment,
    Profile,
    Trial,
    Use,
)
from adaptspec_profiles.as_json import (
    LARGEST_INTEGER,
    choice_from_json,
    environment_digest,
    json_value,
    measured_again_first,
    profile_from_json,
    same_choice,
    same_profile,
    same_trial,
    setting_digest,
)
from adaptspec_profiles.engine import beside, make_engine, reading, safe_url
from adaptspec_profiles.migrations import migrate
from adaptspec_profiles.schema import (
    Base,
    ChoiceRow,
    EnvironmentRow,
    ProfileRow,
    RecordRow,
    TrialRow,
    UseRow,
)

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

T = TypeVar("T")
RACES = 10  # lost to other writers, before it counts as a failure
# What a column that doesn't hold what it should makes of reading it.
DAMAGE = (ValueError, TypeError, AttributeError)
WAYS_OUT = {
    "readonly": "; make the file and its folder writable, or give another --db",
    "unable to open": "; its folder must be there and writable, or give another --db",
    "full": "; free some space, or give another --db",
    "disk I/O": "; look after the disk, or give another --db",
    "locked": "; end the process that uses it, or give another --db",
    "not a database": "; give another --db",
    "malformed": "; put an older copy in its place, or give another --db",
}


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
        except (SQLAlchemyError, CommandError) as error:
            self._engine.dispose()
            raise self._failure("open", error) from error
        except ProfileStoreError:
            self._engine.dispose()
            raise
        self._told: set[tuple[str, object]] = set()  # damaged rows

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
        """Add all profiles in one transaction."""
        checked = [same_profile(profile) for profile in profiles]

        def put(session: Session) -> list[int]:
            ids: dict[int, int] = {}
            for index in measured_again_first(
                checked, lambda profile: _same(session, profile) is not None
            ):
                ids[index] = _put(session, checked[index])
            return [ids[index] for index in range(len(checked))]

        return self._write(put)

    def profiles(
        self,
        *,
        model: str | None = None,
        prompt_class: str | None = None,
        run: str | None = None,
    ) -> list[Profile]:
        """Matching profiles, newest first; damaged rows are left out with a warning."""
        query = select(ProfileRow.id).join(ProfileRow.environment)
        if model is not None:
            query = query.where(EnvironmentRow.model == model)
        if prompt_class is not None:
            query = query.where(ProfileRow.prompt_class == prompt_class)
        if run is not None:
            query = query.where(ProfileRow.run == run)
        query = query.order_by(ProfileRow.created.desc(), ProfileRow.id.desc())
        return self._whole(ProfileRow, query, _profile)

    def profile(self, profile_id: int) -> Profile | None:
        """One profile by its id."""
        if not 0 < profile_id <= LARGEST_INTEGER:
            return None
        try:
            with self._reading() as session:
                row = session.get(ProfileRow, profile_id)
                return None if row is None else _profile(row)
        except (ProfileStoreError, *DAMAGE) as error:
            if isinstance(error.__cause__, SQLAlchemyError):
                raise
            raise ProfileStoreError(
                self._damaged(ProfileRow, {profile_id: error})
            ) from error

    def delete_run(self, run: str) -> int:
        """Delete profiles, choices, trials, records and studies of a run."""
        with self._reading() as session:
            kept = inspect(session.connection()).has_table("studies")
        if kept:
            from adaptspec_profiles.studies import delete_studies

            delete_studies(self.studies(), run)
        with self._writing() as session:
            count = session.scalar(
                select(func.count())
                .where(ProfileRow.run == run)
                .select_from(ProfileRow)
            )
            ours = select(ProfileRow.id).where(ProfileRow.run == run)
            session.execute(delete(UseRow).where(UseRow.profile_id.in_(ours)))
            for table in (ProfileRow, ChoiceRow, TrialRow, RecordRow):
                session.execute(delete(table).where(table.run == run))
            return int(count or 0)

    def put_choices(self, choices: Sequence[ClassChoice]) -> None:
        """Store choices in one transaction."""
        checked = [same_choice(choice) for choice in choices]

        def put(session: Session) -> None:
            for choice in checked:
                _put_choice(session, choice)

        self._write(put)

    def choices(
        self, *, model: str | None = None, run: str | None = None
    ) -> list[ClassChoice]:
        """Matching choices, newest first; damaged rows are left out with a warning."""
        query = select(ChoiceRow.id).join(ChoiceRow.environment)
        if model is not None:
            query = query.where(EnvironmentRow.model == model)
        if run is not None:
            query = query.where(ChoiceRow.run == run)
        found = self._whole(ChoiceRow, query, _choice)
        found.sort(key=lambda c: (c.created, c.run, c.prompt_class), reverse=True)
        return found

    def pin(self, run: str, pinned: bool) -> int:
        """Pin or unpin a run."""

        def put(session: Session) -> int:
            here = update(ChoiceRow).where(ChoiceRow.run == run)
            changed = session.execute(here.values(pinned=pinned))
            return int(getattr(changed, "rowcount", 0))

        return self._write(put)

    def add_trial(self, trial: Trial) -> None:
        """Store a trial; the same number again is ignored."""
        trial = same_trial(trial)
        try:
            with self._writing() as session:
                session.add(TrialRow(**_trial_fields(trial)))
        except ProfileStoreError as error:
            if not isinstance(error.__cause__, IntegrityError):
                raise
            known = any(
                _trial_key(t) == _trial_key(trial) for t in self.trials(trial.run)
            )
            if not (known or self._replaced(trial)):
                raise

    def trials(self, run: str) -> list[Trial]:
        """Trials by class, strategy and number; damaged rows are left out."""
        query = select(TrialRow.id).where(TrialRow.run == run)
        found = self._whole(TrialRow, query, _trial)
        # Not by the database, whose order of text may be a language's.
        return sorted(found, key=_trial_key)

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a record in place of an older one."""
        checked = json_value(value)

        def put(session: Session) -> None:
            # Not read before: what is replaced may be damaged.
            here = (RecordRow.run == run) & (RecordRow.key == key)
            changed = session.execute(
                update(RecordRow).where(here).values(value=checked)
            )
            if not getattr(changed, "rowcount", 0):
                session.add(RecordRow(run=run, key=key, value=checked))

        self._write(put)

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """The record, or None with a warning if it is damaged."""
        try:
            with self._reading() as session:
                row = session.get(RecordRow, (run, key))
                return None if row is None else dict(_object(row.value, "value"))
        except DAMAGE as error:
            self._warn(RecordRow, {f"{run} {key}": error})
            return None

    def add_uses(self, uses: Sequence[Use]) -> None:
        """Add to the sums in one transaction."""

        def add(session: Session) -> None:
            wanted = {use.profile for use in uses}
            there = select(ProfileRow.id).where(ProfileRow.id.in_(wanted))
            known = set(session.scalars(there))
            for use in uses:
                if use.profile not in known:
                    continue
                fields = asdict(use)
                kept = fields.pop("kept")
                here = (UseRow.profile_id == fields.pop("profile")) & (
                    UseRow.prompt_class == fields.pop("prompt_class")
                )
                # Added by the database, so that no other process's sums are lost.
                more = {name: getattr(UseRow, name) + fields[name] for name in fields}
                more |= {
                    name: getattr(UseRow, name) * kept + fields[name] for name in FADING
                }
                changed = session.execute(update(UseRow).where(here).values(more))
                if use.requests and not getattr(changed, "rowcount", 0):
                    row = {"profile_id": use.profile, "prompt_class": use.prompt_class}
                    session.add(UseRow(**row, **fields))

        self._write(add)

    def uses(self) -> list[Use]:
        """All sums, by profile and class."""
        names = [field.name for field in dataclasses.fields(Use)][2:-1]
        found, damaged = [], {}
        with self._reading() as session:
            for row in session.scalars(select(UseRow)):
                values = [getattr(row, name) for name in names]
                if all(type(value) in (int, float) for value in values):
                    found.append(Use(row.profile_id, row.prompt_class, *values))
                else:
                    error = TypeError(f"sums must be numbers, got {values!r:.60}")
                    damaged[row.profile_id] = error
        self._warn(UseRow, damaged)
        return sorted(found, key=lambda use: (use.profile, use.prompt_class))

    def close(self) -> None:
        """Release connections."""
        if self._studies is not None:
            from adaptspec_profiles.studies import close_studies

            close_studies(self._studies)
            self._studies = None
        self._engine.dispose()

    def _whole(
        self,
        table: type[ProfileRow] | type[ChoiceRow] | type[TrialRow],
        wanted: Select[Any],
        made: Callable[[Any], T],
    ) -> list[T]:
        """What the rows of these ids hold, in their order, without damaged ones."""
        with self._reading() as session:
            ids = list(session.scalars(wanted))
        rows = select(table).where(table.id.in_(wanted.order_by(None)))
        try:
            with self._reading() as session:
                read: list[Any] = list(session.scalars(rows))
                found = {row.id: made(row) for row in read}
        except (ProfileStoreError, *DAMAGE):
            found, damaged = {}, {}
            for row_id in ids:
                try:
                    with self._reading() as session:
                        row = session.get(table, row_id)
                        if row is not None:
                            found[row_id] = made(row)
                except (ProfileStoreError, *DAMAGE) as error:
                    damaged[row_id] = error
            self._warn(table, damaged)
        return [found[row_id] for row_id in ids if row_id in found]

    def _replaced(self, trial: Trial) -> bool:
        """Put ``trial`` in the place of a damaged row, if there is one."""
        here = (
            (TrialRow.run == trial.run)
            & (TrialRow.prompt_class == trial.prompt_class)
            & (TrialRow.strategy == trial.strategy)
            & (TrialRow.number == trial.number)
        )
        with self._writing() as session:
            changed = session.execute(
                update(TrialRow).where(here).values(**_trial_fields(trial))
            )
            return bool(getattr(changed, "rowcount", 0))

    def _warn(self, table: type[Base], damaged: Mapping[Any, Exception]) -> None:
        """Warn of each damaged row once."""
        name = table.__tablename__
        new = {k: e for k, e in damaged.items() if (name, k) not in self._told}
        if new:
            self._told |= {(name, key) for key in new}
            warnings.warn(self._damaged(table, new), StoreWarning, stacklevel=4)

    def _damaged(self, table: type[Base], rows: Mapping[Any, Exception]) -> str:
        error = next(iter(rows.values()))
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        keys = ", ".join(map(str, sorted(rows)))
        which = f"rows {keys} of {table.__tablename__} in {self._url} are"
        if len(rows) == 1:
            which = f"row {keys} of {table.__tablename__} in {self._url} is"
        return (
            f"{which} damaged and not used: {reason}; run tune again, or forget the "
            "run with `adaptspec profiles delete RUN`"
        )

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
        way = next((way for sign, way in WAYS_OUT.items() if sign in reason), "")
        return ProfileStoreError(
            f"can't {what} the profile database {self._url}: {reason}{way} "
            "(--db takes a file path or a SQLAlchemy URL)"
        )


def _environment(session: Session, environment: Environment) -> int:
    fields = asdict(environment)
    # Without what older versions didn't tell, so that their rows are found again.
    absent = {"heads", "heads_name"} if environment.heads is None else set()
    absent |= {
        name
        for name in ("configuration", "kernel", "attention")
        if fields[name] is None
    }
    if environment.engine == OURS and environment.concurrency == 1:
        absent |= {"engine", "concurrency"}
    digest = environment_digest({k: v for k, v in fields.items() if k not in absent})
    known = session.scalar(
        select(EnvironmentRow.id).where(EnvironmentRow.digest == digest)
    )
    if known is not None:
        # Written again without a look: it may be damaged.
        session.execute(
            update(EnvironmentRow).where(EnvironmentRow.id == known).values(**fields)
        )
        return known
    row = EnvironmentRow(digest=digest, **fields)
    session.add(row)
    session.flush()
    return row.id


def _of_strategy(profile: Profile) -> ColumnElement[bool]:
    """The settings of a profile's strategy."""
    return and_(
        ProfileRow.run == profile.run,
        ProfileRow.prompt_class == profile.prompt_class,
        ProfileRow.strategy == profile.strategy,
        ProfileRow.baseline == profile.baseline,
    )


def _same(session: Session, profile: Profile) -> int | None:
    """The id of the same setting."""
    return session.scalar(
        select(ProfileRow.id).where(
            _of_strategy(profile),
            ProfileRow.setting == setting_digest(profile.params),
        )
    )


def _put(session: Session, profile: Profile) -> int:
    """Store a profile; the same setting keeps its id, and another gets one of its own.

    A running decoder goes by ids: none may come to mean another setting.
    """
    environment = _environment(session, profile.environment)
    fields = {**_profile_fields(profile), "environment_id": environment}
    outdated = and_(_of_strategy(profile), ProfileRow.created < fields["created"])
    known = _same(session, profile)
    # Measured again: what was seen of the older settings in use doesn't count.
    replaced = select(ProfileRow.id).where(outdated)
    session.execute(delete(UseRow).where(UseRow.profile_id.in_(replaced)))
    if known is not None:
        outdated = and_(outdated, ProfileRow.id != known)
    session.execute(delete(ProfileRow).where(outdated))
    if known is not None:
        session.execute(
            update(ProfileRow).where(ProfileRow.id == known).values(**fields)
        )
        return known
    row = ProfileRow(**fields)
    session.add(row)
    session.flush()
    return row.id


def _put_choice(session: Session, choice: ClassChoice) -> None:
    """Store a choice in place of its class's; a pinned run stays pinned."""
    fields = {
        "environment_id": _environment(session, choice.environment),
        "created": choice.created.replace(tzinfo=None),
        "picks": [asdict(pick) for pick in choice.picks],
        "reason": choice.reason,
        "prompts": choice.prompts,
        "tried": list(choice.tried),
        "objective": choice.objective,
    }
    here = and_(
        ChoiceRow.run == choice.run, ChoiceRow.prompt_class == choice.prompt_class
    )
    if session.scalar(select(ChoiceRow.id).where(here)) is None:
        own = {"run": choice.run, "prompt_class": choice.prompt_class}
        session.add(ChoiceRow(**own, **fields, pinned=choice.pinned))
        session.flush()
        return
    session.execute(update(ChoiceRow).where(here).values(**fields))


def _profile_fields(profile: Profile) -> dict[str, Any]:
    return {
        "run": profile.run,
        "workload": profile.workload,
        "workload_name": profile.workload_name,
        "prompt_class": profile.prompt_class,
        "strategy": profile.strategy,
        "setting": setting_digest(profile.params),
        "params": dict(profile.params),
        "lossless": profile.lossless,
        "baseline": profile.baseline,
        "created": profile.created.replace(tzinfo=None),
        "tokens_per_second": profile.measurement.tokens_per_second,
        "ratio": profile.measurement.ratio,
        "measurement": asdict(profile.measurement),
    }


def _profile(row: ProfileRow) -> Profile:
    """What the row holds.

    Raises:
        ProfileStoreError: naming the field that is wrong, missing or unknown.
    """
    where = row.environment
    names = [field.name for field in dataclasses.fields(Environment)]
    record = {
        "environment": {name: getattr(where, name) for name in names},
        "workload": row.workload,
        "workload_name": row.workload_name,
        "prompt_class": row.prompt_class,
        "strategy": row.strategy,
        "params": _object(row.params, "params"),
        "measurement": _object(row.measurement, "measurement"),
        "created": row.created.replace(tzinfo=timezone.utc),
        "lossless": row.lossless,
        "baseline": row.baseline,
        "run": row.run,
    }
    return dataclasses.replace(profile_from_json(record), id=row.id)


def _choice(row: ChoiceRow) -> ClassChoice:
    """What the row holds.

    Raises:
        ProfileStoreError: naming the field that is wrong, missing or unknown.
    """
    names = [field.name for field in dataclasses.fields(Environment)]
    return choice_from_json(
        {
            "environment": {name: getattr(row.environment, name) for name in names},
            "run": row.run,
            "prompt_class": row.prompt_class,
            "created": row.created.replace(tzinfo=timezone.utc),
            "picks": row.picks,
            "reason": row.reason,
            "prompts": row.prompts,
            "tried": row.tried,
            "objective": row.objective,
            "pinned": row.pinned,
        }
    )


def _trial(row: TrialRow) -> Trial:
    """What the row holds; a search reads them often, so only what must be is looked at.

    Raises:
        TypeError: naming the field that can't be.
    """
    for name, kind in (("number", int), ("state", str), ("value", float | int | None)):
        if not isinstance(getattr(row, name), kind):
            raise TypeError(f"{name} can't be {getattr(row, name)!r}")
    return Trial(
        row.run,
        row.prompt_class,
        row.strategy,
        row.number,
        _object(row.params, "params"),
        row.state,
        row.value,
        _object(row.detail, "detail"),
    )


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a JSON object, got {value!r:.60}")
    return value


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
