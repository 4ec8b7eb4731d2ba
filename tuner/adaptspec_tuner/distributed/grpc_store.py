"""A worker's store behind Optuna's gRPC proxy: the run's studies and nothing else.

The leader puts what a worker must know beside the studies; a worker puts each finished
trial, whole, into its study, from where the leader takes it to the database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from adaptspec.errors import AdaptSpecError
from adaptspec.profile import ClassChoice, Profile, Trial, Use
from adaptspec_tuner.searching.study import RESULT, quiet, trial_of

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

SCHEME = "grpc"
CONNECT_SECONDS = 30.0
EXAMPLE = "grpc://host:13000"


def open_remote(url: str) -> RemoteStore:
    """Connect to a proxy that ``adaptspec profiles serve`` runs.

    Raises:
        AdaptSpecError: if the address is none, nobody answers, or grpcio isn't there.
    """
    try:
        place = urlsplit(url)
        host, port = place.hostname, place.port
    except ValueError:
        host = port = None
    if not host or not port or place.path.strip("/"):
        raise AdaptSpecError(f"a proxy's address is like {EXAMPLE}, got {url!r}")
    try:
        import grpc
        from optuna.storages import GrpcStorageProxy
    except ImportError as error:
        raise AdaptSpecError(
            f"{url} needs gRPC ({error}); `pip install 'adaptspec[grpc]'`"
        ) from error
    with quiet():
        proxy = GrpcStorageProxy(host=host, port=port)
        try:
            proxy.wait_server_ready(timeout=CONNECT_SECONDS)
        except (grpc.RpcError, grpc.FutureTimeoutError, ConnectionError) as error:
            proxy.close()
            raise AdaptSpecError(
                f"nobody answers at {url}; run `adaptspec profiles serve` beside the "
                "database, and open its port"
            ) from error
    return RemoteStore(proxy, f"{SCHEME}://{host}:{port}")


def publish(
    storage: BaseStorage, run: str, records: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put a run's records where :class:`RemoteStore` finds them."""
    study = _study(storage, _records(run), create=True)
    assert study is not None
    for key, value in records.items():
        storage.set_study_user_attr(study, key, dict(value))


class RemoteStore:
    """As much of a :class:`~adaptspec.profile.ProfileStore` as a worker uses.

    Args:
        storage: Optuna's.
        url: What to call it.
    """

    def __init__(self, storage: Any, url: str) -> None:
        self._storage, self._url = storage, url

    @property
    def url(self) -> str:
        """The proxy's address."""
        return self._url

    @property
    def folder(self) -> Path | None:
        """None: a worker keeps no files."""
        return None

    def studies(self) -> Any:
        """Optuna's storage."""
        return self._storage

    def add_trial(self, trial: Trial) -> None:
        """Into its study; ignored if it was given up for dead meanwhile."""
        import optuna

        name = f"{trial.run}/{trial.prompt_class}/{trial.strategy}"
        study = _study(self._storage, name)
        if study is None:
            raise AdaptSpecError(f"{self.url} has no study {name!r} any more")
        number = self._storage.get_trial_id_from_study_id_trial_number(
            study, trial.number
        )
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(number, RESULT, asdict(trial))

    def trials(self, run: str) -> list[Trial]:
        """Those finished through a proxy, and those told by processes at the store."""
        found = []
        for study in self._storage.get_all_studies():
            if study.study_name.startswith(f"{run}/"):
                frozen = self._storage.get_all_trials(study._study_id, deepcopy=False)
                found += [
                    trial_of(t.user_attrs[RESULT])
                    for t in frozen
                    if RESULT in t.user_attrs
                ]
        return sorted(found, key=lambda t: (t.prompt_class, t.strategy, t.number))

    def record(self, run: str, key: str) -> dict[str, Any] | None:
        """What the leader published."""
        study = _study(self._storage, _records(run))
        if study is None:
            return None
        found = self._storage.get_study_user_attrs(study).get(key)
        return None if found is None else dict(found)

    def put_record(self, run: str, key: str, value: Mapping[str, Any]) -> None:
        """Publish a record with the studies, for every process of the run."""
        publish(self._storage, run, {key: value})

    def close(self) -> None:
        """Close the connection."""
        self._storage.close()

    def add_profiles(self, profiles: Sequence[Profile]) -> list[int]:
        """Refused: only the leader has the database."""
        self._refuse()

    def profiles(self, **asked: Any) -> list[Profile]:
        """Refused: only the leader has the database."""
        self._refuse()

    def profile(self, profile_id: int) -> Profile | None:
        """Refused: only the leader has the database."""
        self._refuse()

    def delete_run(self, run: str) -> int:
        """Refused: only the leader has the database."""
        self._refuse()

    def add_uses(self, uses: Sequence[Use]) -> None:
        """Refused: only the leader has the database."""
        self._refuse()

    def uses(self) -> list[Use]:
        """Refused: only the leader has the database."""
        self._refuse()

    def put_choices(self, choices: Sequence[ClassChoice]) -> None:
        """Refused: only the leader has the database."""
        self._refuse()

    def choices(self, **asked: Any) -> list[ClassChoice]:
        """Refused: only the leader has the database."""
        self._refuse()

    def pin(self, run: str, pinned: bool) -> int:
        """Refused: only the leader has the database."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AdaptSpecError(
            f"{self.url} is for --worker: it has no profiles; the tune that leads "
            "takes the database itself with --db"
        )


def _records(run: str) -> str:
    return f"{run}/records"


def _study(storage: Any, name: str, create: bool = False) -> int | None:
    """Its id; None where there is none."""
    import optuna

    with suppress(KeyError):
        return int(storage.get_study_id_from_name(name))
    if not create:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with suppress(optuna.exceptions.DuplicatedStudyError):
        direction = optuna.study.StudyDirection.MAXIMIZE
        return int(storage.create_new_study([direction], name))
    return int(storage.get_study_id_from_name(name))
