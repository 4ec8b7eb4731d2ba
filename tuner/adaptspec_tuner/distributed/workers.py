"""Workers: processes that run trials of a search which another process leads.

The leader records plain decoding, opens the search in the store, and confirms. A
worker joins only a run with its own identifier, which covers model, device, dtype,
threads, versions, prompts and options: so trials run on identical hardware only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from adaptspec.errors import AdaptSpecError
from adaptspec.profile import ProfileStore
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.distributed.grpc_store import publish
from adaptspec_tuner.measuring.profiler import Measurer
from adaptspec_tuner.options import TuneOptions
from adaptspec_tuner.records import SEARCH
from adaptspec_tuner.searching.search import Search

if TYPE_CHECKING:
    from adaptspec.strategy import Strategy

POLL_SECONDS = 0.5
PATIENCE = TuneOptions.budget  # seconds


@runtime_checkable
class KeepsStudies(Protocol):
    """A store with room for Optuna's own tables."""

    def studies(self) -> Any:
        """Optuna's storage."""


def open_search(
    store: ProfileStore, run: str, prompts: Mapping[str, Sequence[Prompt]]
) -> None:
    """Let workers join: these prompts of each class are tried."""
    classes = {name: [p.id for p in group] for name, group in prompts.items()}
    _put(store, run, {"open": True, "classes": classes})


def close_search(store: ProfileStore, run: str) -> None:
    """Let workers end after the trial at hand."""
    record = store.record(run, SEARCH)
    if record is not None and record["open"]:
        _put(store, run, {**record, "open": False})


def _put(store: ProfileStore, run: str, record: Mapping[str, Any]) -> None:
    """Beside the studies, too, for workers that see only these."""
    store.put_record(run, SEARCH, record)
    if isinstance(store, KeepsStudies):
        publish(store.studies(), run, {SEARCH: record})


def work(
    measurer: Measurer,
    strategies: Sequence[type[Strategy]],
    workload: Workload,
    store: ProfileStore,
    run: str,
    options: TuneOptions,
    *,
    deadline: float,
    clock: Callable[[], float],
    warn: Callable[[str], None],
    doing: Callable[[str], None],
    patience: float = PATIENCE,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Run trials of ``run`` until its leader closes the search or the budget is spent.

    Args:
        deadline: Infinite where ``budget_trials`` is the budget.
        options: The leader's; a budget of trials includes others' that are known.
        patience: Seconds that it waits for a leader, if the deadline is later.

    Returns:
        How many were run.

    Raises:
        AdaptSpecError: if no leader opened it in time, or none can in this store.
    """
    if not isinstance(store, KeepsStudies):
        raise AdaptSpecError(f"workers need a database to meet in, not {store.url}")
    doing("waiting for a tune of the same options")
    waited = min(deadline, clock() + patience)
    while not _open(store, run):
        if clock() >= waited:
            raise AdaptSpecError(
                f"no search of run {run} was open in time; a worker needs "
                "a tune of the same model, prompts, options and versions on the same "
                "kind of machine, and the same --db"
            )
        wait(POLL_SECONDS)

    def in_budget() -> bool:
        most = options.budget_trials
        return most is None or search.tried < most

    search = Search(
        measurer,
        store,
        run,
        in_time=lambda: clock() < deadline and in_budget() and _open(store, run),
        warn=warn,
        doing=doing,
        seed=options.seed,
        most=options.trials,
        objective=options.objective,
        storage=store.studies(),
        repeats=0,  # the leader alone measures rivals again
    )
    known = {prompt.id: prompt for prompt in workload.prompts}
    record = store.record(run, SEARCH) or {"classes": {}}
    for name, ids in record["classes"].items():
        prompts = [replace(known[key], prompt_class=name) for key in ids]
        for cls in strategies:
            search.add(name, cls, prompts)
    search.race()
    return search.finished


def _open(store: ProfileStore, run: str) -> bool:
    record = store.record(run, SEARCH)
    return record is not None and bool(record["open"])
