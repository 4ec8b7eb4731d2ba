"""Optuna's storage for SQLite, where one trial in the queue goes to one process.

Imports Optuna: to be imported by who needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

# Changes nothing, but makes the transaction one that writes.
CLAIM = text("UPDATE trials SET state = state WHERE trial_id = :trial_id")


class ClaimingStorage(RDBStorage):
    """An :class:`optuna.storages.RDBStorage` that looks at a trial's state locked.

    Optuna reads the state ``FOR UPDATE`` and then writes it. SQLite doesn't know the
    clause, and Python's driver begins no transaction before the first write: two
    processes that read at once would both take a waiting trial, or both finish one.
    """

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        session = self.scoped_session()  # the one that Optuna goes on with
        try:
            session.execute(CLAIM, {"trial_id": trial_id})
        except SQLAlchemyError:
            session.close()
            raise
        return super().set_trial_state_values(trial_id, state, values)
