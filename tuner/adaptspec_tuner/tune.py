"""The main job: plain decoding, search, confirmation, a result per class."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptspec.cli.progress import Progress
from adaptspec.errors import AdaptSpecError
from adaptspec.model.hardware_costs import (
    HardwareCosts,
    explained,
    measure_costs,
    store_costs,
    stored_costs,
    use_costs,
)
from adaptspec.model.rounding import output_note, store_rounding, stored_rounding
from adaptspec.profile import OURS, Environment, ProfileStore
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.distributed.workers import work
from adaptspec_tuner.measuring.models import Models
from adaptspec_tuner.measuring.other_programs import OtherPrograms
from adaptspec_tuner.measuring.profiler import Profiler, Recording, Sample, Setting
from adaptspec_tuner.measuring.prompts import check_model, measurable
from adaptspec_tuner.options import (
    TuneOptions,
    asked_prompts,
    check_store,
    chosen_strategies,
    opened_store,
)
from adaptspec_tuner.phases import tune_with
from adaptspec_tuner.reporting.result import TuneResult
from adaptspec_tuner.reporting.usage import Usage
from adaptspec_tuner.time_budget import for_costs
from adaptspec_tuner.tuning_run import MakesReplayer, TuneInputs, run_id

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Engine
    from adaptspec.host import Host
    from adaptspec.model.language_model import LanguageModel
    from adaptspec_tuner.distributed.ray_pool import RayPool
    from adaptspec_tuner.replaying.replayer import Replayer


def tune(
    model: Any,
    draft_model: Any = None,
    workload: Workload | Path | str | None = None,
    options: TuneOptions | None = None,
    *,
    db: str | ProfileStore | None = None,
    host: Host | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Find the fastest strategy for each class of ``workload`` on ``model``.

    Args:
        model: A folder, hub name, loaded model or ``LanguageModel``; with another
            engine in ``options``, a file, folder or name as that engine takes it.
        workload: Prompts, or a file of them; default: the examples.
        options: Budget, strategies, ...; those of ``adaptspec tune``.

    Raises:
        AdaptSpecError: for bad options, a bad workload, a database that can't be
            written or a model that won't load or can't be tuned.
        Stopped: where something ended it on its way; its ``result`` holds the classes
            that were confirmed. ``tuning_run.Interrupted`` on Ctrl-C.
    """
    started = clock()
    options = options or TuneOptions()
    if options.engine != OURS:
        from adaptspec_tuner.engines.tune import tune_engine

        return tune_engine(
            *(model, draft_model, workload, options),
            db=db,
            host=host,
            progress=progress,
            clock=clock,
        )
    import torch

    from adaptspec.environment import environment_of
    from adaptspec.host import Host

    host = host or Host.installed()
    chosen = chosen_strategies(host, options.strategies, options.allow_lossy)
    workload = asked_prompts(workload, options.skip_bad)
    check_store(host, db, options.worker)  # before a model is loaded
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models = Models(
        model,
        draft_model,
        options.heads,
        options.dtype,
        options.device,
        options.trust_remote_code,
        options.compile,
    )
    if options.ray is not None and not models.are_paths:
        raise AdaptSpecError("ray takes models by path, which every node loads")
    engine = models.engine(host)
    target, draft = engine.model, engine.draft
    unavailable = {
        cls.name: reason
        for cls in chosen
        if (reason := cls.unavailable(target, draft)) is not None
    }
    chosen = [cls for cls in chosen if cls.name not in unavailable]
    # Other engines run on untouched copies, ours on the accelerated models.
    theirs, their_draft = models.untouched() if options.baselines else (target, draft)
    compared: list[Setting] = []
    if options.baselines:
        compared, missing = _compared(host, theirs, their_draft)
        unavailable |= missing
    environment = environment_of(target, draft)
    profiler = Profiler(
        engine,
        host,
        options.max_new_tokens,
        theirs,
        their_draft,
        options.max_memory,
        options.controls,
        options.seed,
    )
    progress = progress or Progress(None, clock)
    notes: list[str] = []
    workload = measurable(
        workload,
        profiler,
        limit=options.limit,
        skip_bad=options.skip_bad,
        warn=notes.append,
    )
    check_model(target, profiler.ids(workload.prompts[0]))
    store = opened_store(host, db, options.worker)
    usage = None
    if models.are_paths:
        usage = Usage.of(
            *(str(model), None if draft_model is None else str(draft_model), options),
            db if db is None or isinstance(db, str) else store.url,
        )
    if not options.worker:
        notes.append(_output_note(store, environment, target))
    deadline = started + options.seconds

    def doing(text: str) -> None:
        progress.doing(text, deadline - clock())

    pool = None
    try:
        if options.worker:
            for note in notes:
                progress.say(note)
            run = run_id(environment, workload, options)
            with progress:
                count = work(
                    profiler,
                    chosen,
                    workload,
                    store,
                    run,
                    options,
                    deadline=deadline,
                    clock=clock,
                    warn=progress.say,
                    doing=doing,
                )
            return TuneResult(
                *(run, environment, workload.name, store.url, [], [], unavailable),
                worked=count,
                usage=usage,
            )
        if options.ray is not None:
            doing("starting workers")
            pool = _pool(options, models, environment, progress.say)
        return tune_with(
            TuneInputs(
                profiler,
                chosen,
                workload,
                store,
                environment,
                options,
                clock=clock,
                progress=progress,
                started=started,
                baselines=compared,
                unavailable=unavailable,
                replayer=_replayer(
                    *(engine, host, profiler, store, environment),
                    longest=for_costs(options.seconds),
                    doing=doing,
                    warn=progress.say,
                ),
                pool=pool,
                notes=notes,
                needs=profiler.needs,
                processor=time.process_time,
                others=OtherPrograms,
                usage=usage,
            )
        )
    finally:
        if pool is not None:
            pool.close()
        if store is not db:
            store.close()


def _output_note(
    store: ProfileStore, environment: Environment, target: LanguageModel
) -> str:
    """How near outputs are to plain decoding's; found out once per environment."""
    if (rounding := stored_rounding(store, environment)) is None:
        rounding = target.rounding
        store_rounding(store, environment, rounding)
    return output_note(rounding)


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
    warn: Callable[[str], None],
) -> MakesReplayer:
    """Makes replayers; the first measures forwards, where nobody has here.

    It does so, too, where the stored costs don't explain plain decoding's forwards.

    Args:
        longest: Seconds that measuring may take.
    """
    from adaptspec_tuner.replaying.replayer import Replayer

    known: list[HardwareCosts] = []

    def costs_for(recordings: Collection[Recording]) -> HardwareCosts:
        costs = stored_costs(store, environment)
        if costs is not None and explained(costs.target, forwards_of(recordings)):
            return costs
        if costs is not None:
            warn(
                f"the forwards' costs of {costs.measured[:10]} don't explain what "
                "plain decoding takes now; measuring them again"
            )
        doing("measuring forwards")
        text = [t for one in recordings for t in (*one.prompt, *one.tokens)]
        most = max(len(one.prompt) + one.most for one in recordings)
        costs = measure_costs(
            engine.model,
            engine.draft,
            contexts=contexts_for(most),
            longest=longest,
            text=text,
        )
        store_costs(store, environment, costs)
        return costs

    def make(plain: Sequence[tuple[Prompt, Sample]]) -> Replayer | None:
        if engine.model.capability.level == "plain":
            return None
        recordings = {p.id: profiler.recording(p, s) for p, s in plain}
        if not known:
            known.append(costs_for(recordings.values()))
        (costs,) = known
        use_costs(costs, engine.model, engine.draft)
        return Replayer(engine, host, costs.target, recordings, costs.draft)

    return make


def contexts_for(
    most: int, least: int = 2, choices: Sequence[int] = (128, 1024, 4096)
) -> list[int]:
    """Numbers of cached tokens that forwards are timed behind.

    Args:
        most: Tokens of the longest prompt with its answer; the last slope goes on a
            little, so up to twice the largest number.
        least: How many numbers there are at least, for a slope.
        choices: Ascending numbers, of which as many are taken as are needed.
    """
    needed = sum(2 * context < most for context in choices) + 1
    return list(choices[: max(least, needed)])


def forwards_of(recordings: Iterable[Recording]) -> list[tuple[int, float]]:
    """Of each timed recording the cached tokens and seconds of a typical forward."""
    return [
        (len(one.prompt) + len(one.tokens) // 2, one.seconds_target / one.forwards)
        for one in recordings
        if one.forwards and one.seconds_target > 0
    ]


def _pool(
    options: TuneOptions,
    models: Models,
    environment: Environment,
    warn: Callable[[str], None],
) -> RayPool:
    from adaptspec_tuner.distributed.ray_pool import RayPool, bench, place_of

    build = functools.partial(
        bench,
        models.as_text(),
        options.max_new_tokens,
        options.max_memory,
        environment.threads,
        options.controls,
        options.seed,
    )
    return RayPool(str(options.ray), build, place_of(environment), warn)
