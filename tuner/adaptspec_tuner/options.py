"""What may be asked of a tune: options that fit, strategies, prompts, a store."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptspec.errors import AdaptSpecError, UnknownStrategyError
from adaptspec.profile import LATENCY, PLAIN, SPEED, ProfileStore
from adaptspec.workloads import Workload, example_workload, read_workload
from adaptspec_tuner.distributed.grpc_store import SCHEME, RemoteStore, open_remote

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec.strategy import Strategy

DECLARED, AUTO = "declared", "auto"  # where prompts' classes come from
EXAMPLE_TOKENS = 48


def check_options(
    objective: str, classes: str, baselines: bool, limit: int | None
) -> None:
    """Refuse what is unknown or doesn't go together."""
    if objective not in (SPEED, LATENCY):
        raise AdaptSpecError(
            f"objective must be {SPEED!r} or {LATENCY!r}, got {objective!r}"
        )
    if classes not in (DECLARED, AUTO):
        raise AdaptSpecError(
            f"classes must be {DECLARED!r} or {AUTO!r}, got {classes!r}"
        )
    if limit is not None and limit < 1:
        raise AdaptSpecError(f"limit must be 1 prompt per class or more, got {limit}")
    if baselines and objective != SPEED:
        raise AdaptSpecError(
            "baselines tell tokens per second only; leave --baselines out or take "
            f"--objective {SPEED}"
        )


def chosen_strategies(
    host: Host, names: Sequence[str] | None, allow_lossy: bool
) -> list[type[Strategy]]:
    """Those to be tried, plain decoding aside.

    Raises:
        UnknownStrategyError: for a name that no plugin brings.
        AdaptSpecError: for a lossy one that isn't allowed.
    """
    known = {n: c for n, c in host.strategies.items() if n != PLAIN}
    if names is None:
        return [cls for cls in known.values() if cls.lossless or allow_lossy]
    if unknown := [n for n in names if n not in known and n != PLAIN]:
        raise UnknownStrategyError(
            f"no strategy {unknown[0]!r}; known: {', '.join(sorted(known))}"
        )
    for name in names:
        if name != PLAIN and not (known[name].lossless or allow_lossy):
            raise AdaptSpecError(
                f"{name} is lossy: it changes the distribution of sampled output; add "
                "--allow-lossy (allow_lossy=True) to measure it"
            )
    return [known[n] for n in dict.fromkeys(names) if n != PLAIN]


def asked_prompts(workload: Workload | Path | str | None, skip_bad: bool) -> Workload:
    """The prompts of a file; the examples where none are given."""
    if workload is None:
        return _shortened(example_workload(), EXAMPLE_TOKENS)
    if isinstance(workload, Workload):
        return workload
    return read_workload(Path(workload), skip_bad)


def _shortened(workload: Workload, most: int) -> Workload:
    """The examples with shorter answers: the first try should end soon."""
    prompts = [
        replace(p, max_new_tokens=min(p.max_new_tokens or most, most))
        for p in workload.prompts
    ]
    return replace(workload, prompts=tuple(prompts))


def check_store(host: Host, db: str | ProfileStore | None, worker: bool) -> None:
    """Refuse a store that can't be written, before work is done for it.

    Raises:
        AdaptSpecError: naming it, the reason and the way out.
    """
    store = opened_store(host, db, worker)
    try:
        if not isinstance(store, RemoteStore):
            name = f"check-{uuid.uuid4().hex}"
            store.put_record(name, name, {})
            store.delete_run(name)
    finally:
        if store is not db:
            store.close()


def opened_store(
    host: Host, db: str | ProfileStore | None, worker: bool
) -> ProfileStore:
    """Where profiles are kept; only a worker may reach it through a proxy."""
    if isinstance(db, str) and db.startswith(f"{SCHEME}://"):
        store: ProfileStore = open_remote(db)
    else:
        store = host.open_store(db) if db is None or isinstance(db, str) else db
    if isinstance(store, RemoteStore) and not worker:
        store.close()
        raise AdaptSpecError(
            f"{store.url} is a proxy for --worker; the tune that leads takes the "
            "database itself with --db"
        )
    return store
