"""The main job: plain decoding, search, confirmation, a result per class."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptspec.cli.progress import Progress
from adaptspec.errors import AdaptSpecError
from adaptspec.model.hardware_costs import (
    measure_costs,
    store_costs,
    stored_costs,
    use_costs,
)
from adaptspec.profile import SPEED, Environment, ProfileStore
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.distributed.workers import KeepsStudies, work
from adaptspec_tuner.measuring.models import Models
from adaptspec_tuner.measuring.profiler import Profiler, Sample, Setting
from adaptspec_tuner.measuring.prompts import check_model, measurable
from adaptspec_tuner.options import (
    AUTO,
    DECLARED,
    asked_prompts,
    check_options,
    check_store,
    chosen_strategies,
    opened_store,
)
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.tuning_run import MakesReplayer, Run, run_id

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Engine
    from adaptspec.host import Host
    from adaptspec.model.language_model import LanguageModel
    from adaptspec_tuner.distributed.ray_pool import RayPool
    from adaptspec_tuner.replaying.replayer import Replayer

DEFAULT_BUDGET = 480.0  # seconds
DEFAULT_NEW_TOKENS = 64
COSTS_SHARE = 0.05  # of the budget, for measuring forwards (once per environment)
LONGEST_COSTS = 30.0  # seconds, whatever the budget


def tune(
    model: Any,
    draft_model: Any = None,
    workload: Workload | Path | str | None = None,
    *,
    db: str | ProfileStore | None = None,
    budget: float = DEFAULT_BUDGET,
    budget_trials: int | None = None,
    objective: str = SPEED,
    max_memory: int | None = None,
    classes: str = DECLARED,
    strategies: Sequence[str] | None = None,
    heads: Sequence[Path | str] = (),
    allow_lossy: bool = False,
    trials: int = 40,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    skip_bad: bool = False,
    baselines: bool = False,
    fresh: bool = False,
    worker: bool = False,
    ray: str | None = None,
    host: Host | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Find the fastest strategy for each class of ``workload`` on ``model``.

    Args:
        model: A folder, hub name, loaded model or ``LanguageModel``.
        budget: Seconds, loading included.
        budget_trials: Measured trials in all, instead of ``budget``.
        objective: ``speed`` (tokens per second) or ``latency`` (p95 per token).
        max_memory: Bytes; settings that take more are refused.
        classes: ``declared`` in the workload, or ``auto``: discovered from the prompts.
        strategies: Only these; default: every lossless one that can run.
        heads: Folders of heads trained for the model.
        allow_lossy: Measure strategies that change the distribution of sampled output,
            too. Their results say so, and they are never the choice here.
        trials: Most trials per class and strategy.
        trust_remote_code: Whether code that comes with the models may run.
        limit: Most prompts per class.
        skip_bad: Leave out prompts that can't be read or decoded, and say how many.
        baselines: Measure other engines beside, on untouched copies of the models.
        fresh: Forget what an earlier run with these options measured.
        worker: Only run trials of another process's equal tune, which leads.
        ray: Address of a Ray cluster (``auto``: this machine's) whose nodes of this
            one's kind run the trials; the models must be paths that they have, too.

    Raises:
        AdaptSpecError: for bad options, a bad workload, a database that can't be
            written or a model that won't load or can't be tuned.
        Stopped: where something ended it on its way; its ``result`` holds the classes
            that were confirmed. ``tuning_run.Interrupted`` on Ctrl-C.
    """
    started = clock()
    import torch

    from adaptspec.environment import environment_of
    from adaptspec.host import Host

    check_options(objective, classes, baselines, limit)
    if budget_trials is not None:
        budget = math.inf
    host = host or Host.installed()
    chosen = chosen_strategies(host, strategies, allow_lossy)
    workload = asked_prompts(workload, skip_bad)
    check_store(host, db, worker)  # before a model is loaded
    if threads is not None:
        torch.set_num_threads(threads)
    models = Models(model, draft_model, heads, dtype, device, trust_remote_code)
    engine = models.engine(host)
    target, draft = engine.model, engine.draft
    unavailable = {
        cls.name: reason
        for cls in chosen
        if (reason := cls.unavailable(target, draft)) is not None
    }
    chosen = [cls for cls in chosen if cls.name not in unavailable]
    # Other engines run on untouched copies, ours on the accelerated models.
    theirs, their_draft = models.untouched() if baselines else (target, draft)
    compared, missing = _compared(host, theirs, their_draft) if baselines else ([], {})
    unavailable |= missing
    if ray is not None and (worker or not models.are_paths):
        raise AdaptSpecError(
            "ray takes models by path, which every node loads, and no --worker, which "
            "is another way to share trials"
        )
    environment = environment_of(target, draft)
    profiler = Profiler(engine, host, max_new_tokens, theirs, their_draft, max_memory)
    progress = progress or Progress(None, clock)
    notes: list[str] = []
    workload = measurable(
        workload,
        profiler,
        limit=limit,
        one_class=classes == AUTO,
        skip_bad=skip_bad,
        warn=notes.append,
    )
    check_model(target, profiler.ids(workload.prompts[0]))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if objective != SPEED:
        options["objective"] = objective
    if max_memory is not None:
        options["max_memory"] = max_memory
    if classes != DECLARED:
        options["classes"] = classes
    store = opened_store(host, db, worker)
    deadline = started + budget

    def doing(text: str) -> None:
        progress.doing(text, deadline - clock())

    pool = None
    try:
        if worker:
            if not isinstance(store, KeepsStudies):
                raise AdaptSpecError(
                    f"workers need a database to meet in, not {store.url}"
                )
            run = run_id(environment, workload, {**options, "seed": seed})
            for note in notes:
                progress.say(note)
            with progress:
                count = work(
                    profiler,
                    chosen,
                    workload,
                    store,
                    run,
                    storage=store.studies(),
                    deadline=deadline,
                    patience=DEFAULT_BUDGET,
                    budget_trials=budget_trials,
                    clock=clock,
                    warn=progress.say,
                    doing=doing,
                    most=trials,
                    seed=seed,
                    objective=objective,
                )
            return TuneResult(
                *(run, environment, workload.name, store.url, [], [], unavailable),
                worked=count,
            )
        if ray is not None:
            doing("starting workers")
            pool = _pool(
                ray, models, max_new_tokens, max_memory, environment, progress.say
            )
        return tune_with(
            Run(
                profiler,
                chosen,
                workload,
                store,
                environment,
                deadline=deadline,
                clock=clock,
                progress=progress,
                trials=trials,
                seed=seed,
                options=options,
                objective=objective,
                budget_trials=budget_trials,
                discovered=classes == AUTO,
                started=started,
                baselines=compared,
                unavailable=unavailable,
                fresh=fresh,
                replayer=_replayer(
                    *(engine, host, profiler, store, environment),
                    longest=min(LONGEST_COSTS, budget * COSTS_SHARE),
                    doing=doing,
                ),
                pool=pool,
                notes=notes,
            )
        )
    finally:
        if pool is not None:
            pool.close()
        if store is not db:
            store.close()


def _compared(
    host: Host, target: LanguageModel, draft: LanguageModel | None
) -> tuple[list[Setting], dict[str, str]]:
    """Other engines with their defaults, and of those that can't run why."""
    settings: list[Setting] = []
    unavailable: dict[str, str] = {}
    for baseline in host.baselines.values():
        if reason := baseline.unavailable(target, draft):
            unavailable[baseline.name] = reason
        else:
            defaults = dict(baseline.Params().model_dump())
            settings.append(Setting(baseline.name, defaults, baseline=True))
    return settings, unavailable


def _replayer(
    engine: Engine,
    host: Host,
    profiler: Profiler,
    store: ProfileStore,
    environment: Environment,
    *,
    longest: float,
    doing: Callable[[str], None],
) -> MakesReplayer:
    """Makes replayers; the first measures forwards, where nobody has here.

    Args:
        longest: Seconds that measuring may take.
    """
    from adaptspec_tuner.replaying.replayer import Replayer

    def make(plain: Sequence[tuple[Prompt, Sample]]) -> Replayer | None:
        if engine.model.capability.level == "plain":
            return None
        costs = stored_costs(store, environment)
        if costs is None:
            doing("measuring forwards")
            costs = measure_costs(engine.model, engine.draft, longest=longest)
            store_costs(store, environment, costs)
        use_costs(costs, engine.model, engine.draft)
        recordings = {p.id: profiler.recording(p, s) for p, s in plain}
        return Replayer(engine, host, costs.target, recordings, costs.draft)

    return make


def _pool(
    address: str,
    models: Models,
    max_new_tokens: int,
    max_memory: int | None,
    environment: Environment,
    warn: Callable[[str], None],
) -> RayPool:
    from adaptspec_tuner.distributed.ray_pool import RayPool, bench, place_of

    build = functools.partial(
        bench, models.as_text(), max_new_tokens, max_memory, environment.threads
    )
    return RayPool(address, build, place_of(environment), warn)
