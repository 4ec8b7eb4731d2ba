"""The main job: plain decoding, search, confirmation, a result per class."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptspec.classify import KEY as CLASSIFIER
from adaptspec.classify import STATES, TEXT, Classifier
from adaptspec.costs import measure_costs, store_costs, stored_costs, use_costs
from adaptspec.errors import AdaptSpecError, UnknownStrategyError
from adaptspec.profile import (
    LATENCY,
    PLAIN,
    SPEED,
    Environment,
    Profile,
    ProfileStore,
)
from adaptspec.selector import FEWEST_PROMPTS, select, stale_versions
from adaptspec_tuner.bootstrap import overall
from adaptspec_tuner.classes import (
    ReadsStates,
    classified,
    discover,
    known_only,
    probed,
    replayed_gains,
)
from adaptspec_tuner.confirm import Confirmed, as_record, confirm
from adaptspec_tuner.presearch import as_records, presearch
from adaptspec_tuner.profiler import (
    PLAIN_SETTING,
    Measurer,
    Profiler,
    Sample,
    Setting,
    typical,
)
from adaptspec_tuner.progress import Progress
from adaptspec_tuner.remote import SCHEME, RemoteStore, open_remote
from adaptspec_tuner.report import ClassResult, TuneResult, told_errors
from adaptspec_tuner.search import HOPELESS, Arm, Search, TrialPool
from adaptspec_tuner.spending import Spending
from adaptspec_tuner.workers import KeepsStudies, close_search, open_search, work
from adaptspec_tuner.workloads import (
    DEFAULT_CLASS,
    Prompt,
    Workload,
    example_workload,
    read_workload,
    split,
)

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec.profile import Trial
    from adaptspec.strategy import Strategy
    from adaptspec_tuner.replay import Replayer

DEFAULT_BUDGET = 480.0  # seconds
DEFAULT_NEW_TOKENS = 64
FINALISTS = 3
REPEATS = 3
PLAIN_SHARE = 0.25  # of the budget, at most
FIRST_TRIALS_SHARE = 0.6  # of the search, for one trial of every strategy
CONFIRM_SHARE = 0.45  # of the budget, kept back for the confirmation
COSTS_SHARE = 0.05  # of the budget, for measuring forwards (once per environment)
LONGEST_COSTS = 40.0  # seconds, whatever the budget
DECLARED, AUTO = "declared", "auto"  # where prompts' classes come from
REPLAY_SHARE = 0.15  # of the search, for trials without the target
LATE_PREDICTION = 1.0  # seconds of drafting that a prediction may take past the budget
CLASSIFIED = "classified"  # prompt id -> class, where finding it took a forward

EXAMPLE_TOKENS = 48


class Interrupted(AdaptSpecError):
    """Stopped by the user; what was finished is stored.

    Args:
        result: The classes already confirmed.
    """

    def __init__(self, result: TuneResult) -> None:
        super().__init__(
            "stopped; finished trials are kept, the same command continues"
        )
        self.result = result


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
    class_features: str = TEXT,
    strategies: Sequence[str] | None = None,
    heads: Sequence[Path | str] = (),
    allow_lossy: bool = False,
    trials: int = 40,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    dtype: str = "auto",
    device: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    limit: int | None = None,
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
        class_features: What discovered classes are told by: ``text``, or ``states``,
            the target's own once it has read the prompt.
        strategies: Only these; default: every lossless one that can run.
        heads: Folders of heads trained for the model.
        allow_lossy: Measure strategies that change the law of sampled output, too.
            Their results say so, and they are never the choice here.
        trials: Most trials per class and strategy.
        limit: Most prompts per class.
        baselines: Measure other engines beside, on untouched copies of the models.
        fresh: Forget what an earlier run with these options measured.
        worker: Only run trials of another process's equal tune, which leads.
        ray: Address of a Ray cluster (``auto``: this machine's) whose nodes of this
            one's kind run the trials; the models must be paths that they have, too.

    Raises:
        AdaptSpecError: for bad options, a bad workload or a model that won't load.
        Interrupted: on Ctrl-C.
    """
    started = clock()
    import torch

    from adaptspec.decoder import environment_of
    from adaptspec.decoding.engine import Engine
    from adaptspec.host import Host
    from adaptspec.models import LanguageModel, load_model
    from adaptspec_tuner.replay import Replayer

    if objective not in (SPEED, LATENCY):
        raise AdaptSpecError(
            f"objective must be {SPEED!r} or {LATENCY!r}, got {objective!r}"
        )
    if classes not in (DECLARED, AUTO):
        raise AdaptSpecError(
            f"classes must be {DECLARED!r} or {AUTO!r}, got {classes!r}"
        )
    if class_features not in (TEXT, STATES):
        raise AdaptSpecError(
            f"class_features must be {TEXT!r} or {STATES!r}, got {class_features!r}"
        )
    if class_features != TEXT and classes != AUTO:
        raise AdaptSpecError(
            f"--class-features {class_features} is about discovered classes; add "
            f"--classes {AUTO}"
        )
    if baselines and objective != SPEED:
        raise AdaptSpecError(
            "baselines tell tokens per second only; leave --baselines out or take "
            f"--objective {SPEED}"
        )
    if budget_trials is not None:
        budget = math.inf
    host = host or Host.installed()
    chosen = _chosen(host, strategies, allow_lossy)
    if workload is None:
        workload = _shortened(example_workload(), EXAMPLE_TOKENS)
    elif not isinstance(workload, Workload):
        workload = read_workload(Path(workload))
    workload = _limited(workload, limit)
    if threads is not None:
        torch.set_num_threads(threads)

    def loaded(source: Any, accelerate: bool = True) -> LanguageModel:
        if isinstance(source, LanguageModel):
            return source
        return load_model(source, dtype=dtype, device=device, accelerate=accelerate)

    target = loaded(model)
    for folder in heads:
        target.attach(host.open_heads(folder, target))
    draft = None if draft_model is None else loaded(draft_model)
    engine = Engine(target, draft)
    unavailable = {
        cls.name: reason
        for cls in chosen
        if (reason := cls.unavailable(target, draft)) is not None
    }
    compared = []
    # Other engines run on untouched copies, ours on the accelerated models.
    theirs, their_draft = target, draft
    if baselines:
        theirs = loaded(model, accelerate=False)
        their_draft = None if draft is None else loaded(draft_model, accelerate=False)
    for baseline in host.baselines.values() if baselines else ():
        if reason := baseline.unavailable(theirs, their_draft):
            unavailable[baseline.name] = reason
        else:
            compared.append(Setting(baseline.name, _defaults(baseline), baseline=True))
    if ray is not None and (worker or not _are_paths(model, draft_model)):
        raise AdaptSpecError(
            "ray takes models by path, which every node loads, and no --worker, which "
            "is another way to share trials"
        )
    store = _opened(host, db)
    if isinstance(store, RemoteStore) and not worker:
        store.close()
        raise AdaptSpecError(
            f"{store.url} is a proxy for --worker; the tune that leads takes the "
            "database itself with --db"
        )
    environment = environment_of(target, draft)
    from_states = class_features == STATES
    profiler = Profiler(
        *(engine, host, max_new_tokens, theirs, their_draft, max_memory),
        keep_states=from_states,
    )
    progress = progress or Progress(None, clock)

    def replayer(plain: Sequence[tuple[Prompt, Sample]]) -> Replayer | None:
        if target.capability.level == "plain":
            return None
        costs = stored_costs(store, environment)
        if costs is None:
            progress.doing("measuring forwards", started + budget - clock())
            longest = min(LONGEST_COSTS, budget * COSTS_SHARE)
            costs = measure_costs(target, draft, longest=longest)
            store_costs(store, environment, costs)
        use_costs(costs, target, draft)
        recordings = {p.id: profiler.recording(p, s) for p, s in plain}
        return Replayer(engine, host, costs.target, recordings, costs.draft)

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if objective != SPEED:
        options["objective"] = objective
    if max_memory is not None:
        options["max_memory"] = max_memory
    if classes != DECLARED:
        options["classes"] = classes
    if from_states:
        options["class_features"] = class_features
    if worker:
        if not isinstance(store, KeepsStudies):
            raise AdaptSpecError(f"workers need a database to meet in, not {store.url}")
        try:
            with progress:
                run = run_id(environment, workload, {**options, "seed": seed})
                count = work(
                    profiler,
                    [c for c in chosen if c.name not in unavailable],
                    workload,
                    store,
                    run,
                    storage=store.studies(),
                    deadline=started + budget,
                    clock=clock,
                    warn=progress.say,
                    doing=lambda text: progress.doing(text, started + budget - clock()),
                    most=trials,
                    seed=seed,
                    objective=objective,
                )
            return TuneResult(
                run,
                environment,
                workload.name,
                store.url,
                [],
                [],
                unavailable,
                worked=count,
            )
        finally:
            if store is not db:
                store.close()
    pool = None
    try:
        if ray is not None:
            from adaptspec_tuner.cluster import RayPool, bench, place_of

            progress.doing("starting workers", started + budget - clock())
            loading = {
                "dtype": dtype,
                "device": device,
                "heads": [str(folder) for folder in heads],
                "max_new_tokens": max_new_tokens,
                "max_memory": max_memory,
            }
            pool = RayPool(
                ray,
                functools.partial(
                    bench,
                    str(model),
                    None if draft_model is None else str(draft_model),
                    loading,
                    environment.threads,
                ),
                place_of(environment),
                progress.say,
            )
        return tune_with(
            profiler,
            [c for c in chosen if c.name not in unavailable],
            workload,
            store,
            environment,
            deadline=started + budget,
            clock=clock,
            trials=trials,
            seed=seed,
            options=options,
            objective=objective,
            budget_trials=budget_trials,
            discovered=classes == AUTO,
            states=profiler if from_states else None,
            started=started,
            baselines=compared,
            unavailable=unavailable,
            fresh=fresh,
            progress=progress,
            replayer=replayer,
            pool=pool,
        )
    finally:
        if pool is not None:
            pool.close()
        if store is not db:
            store.close()


def tune_with(
    measurer: Measurer,
    strategies: Sequence[type[Strategy]],
    workload: Workload,
    store: ProfileStore,
    environment: Environment,
    *,
    deadline: float,
    clock: Callable[[], float],
    progress: Progress,
    trials: int = 40,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    baselines: Sequence[Setting] = (),
    unavailable: Mapping[str, str] | None = None,
    fresh: bool = False,
    objective: str = SPEED,
    budget_trials: int | None = None,
    discovered: bool = False,
    states: ReadsStates | None = None,
    started: float | None = None,
    replayer: Callable[[Sequence[tuple[Prompt, Sample]]], Replayer | None]
    | None = None,
    pool: TrialPool | None = None,
) -> TuneResult:
    """The same with everything that touches a model, clock or disk passed in.

    Args:
        replayer: From plain decoding of prompts to what predicts from it.
        discovered: Whether classes are discovered; those declared are left aside.
        states: What they are told by, in place of the prompts' texts.
        deadline: Infinite where ``budget_trials`` is the budget.
        started: When loading began.
        pool: Runs the search's trials in place of ``measurer``.
    """
    run = run_id(environment, workload, {**(options or {}), "seed": seed})
    if fresh:
        store.delete_run(run)
    spending = Spending(store, run, clock, clock() if started is None else started)
    total = max(0.0, deadline - clock())
    notes: list[str] = []
    lossy = {cls.name for cls in strategies if not cls.lossless}
    results: list[ClassResult] = []
    result = TuneResult(
        run,
        environment,
        workload.name,
        store.url,
        results,
        notes,
        dict(unavailable or {}),
    )

    def warn(text: str) -> None:
        notes.append(text)
        progress.say(text)

    def doing(text: str) -> None:
        progress.doing(text, deadline - clock())

    def before(share: float) -> float:
        """The moment after which ``share`` of the time is left."""
        return deadline if math.isinf(total) else deadline - total * share

    search_end, plain_end = before(CONFIRM_SHARE), before(1 - PLAIN_SHARE)

    def in_time() -> bool:
        tried = sum(len(arm.trials) + len(arm.running) for arm in search.arms)
        return clock() < search_end and (budget_trials is None or tried < budget_trials)

    search = Search(
        measurer,
        store,
        run,
        in_time=in_time,
        warn=warn,
        doing=doing,
        seed=seed,
        most=trials,
        objective=objective,
        storage=store.studies() if isinstance(store, KeepsStudies) else None,
        labels={"model": environment.model_name, "workload": workload.name},
        pool=pool,
    )
    if changed := _stale(store, environment):
        warn(changed)
    tuning, held_out = split(_unclassed(workload) if discovered else workload, seed)
    try:
        with progress:
            spending.begin("plain")
            plain = _plain(search, tuning, lambda: clock() < plain_end, warn)
            recorded = [p for p in tuning.prompts if p.id in plain]
            replaying = [cls for cls in strategies if cls.replays]
            predictor = None
            if replayer is not None and replaying and clock() < search_end:
                spending.begin("costs")
                predictor = replayer([(p, plain[p.id]) for p in recorded])
            if discovered:
                spending.begin("classes")
                doing("discovering classes")
                end = clock() + REPLAY_SHARE * max(0.0, search_end - clock())
                classifier = _classifier(
                    store,
                    run,
                    predictor,
                    replaying,
                    recorded,
                    in_time=lambda: clock() < end,
                    seed=seed,
                    states=states,
                )
                known = store.record(run, CLASSIFIED) or {}
                tuning = classified(tuning, classifier, states, known)
                held_out = classified(held_out, classifier, states, known)
                if states is not None:
                    both = (*tuning.prompts, *held_out.prompts)
                    assigned = {p.id: p.prompt_class for p in both}
                    store.put_record(run, CLASSIFIED, assigned)
                tuning, odd = known_only(tuning, tuning.classes)
                held_out, strange = known_only(held_out, tuning.classes)
                for part, left_out in (("tuning", odd), ("held-out", strange)):
                    if left_out:
                        warn(
                            f"{len(left_out)} of the {part} prompts are of no class "
                            "that was tuned on, and decoded plainly: "
                            f"{', '.join(left_out)}"
                        )
                recorded = [p for p in tuning.prompts if p.id in plain]
                for line in classifier.describe():
                    warn(f"class {line}")
            usable = affordable(
                recorded,
                {key: sample.seconds for key, sample in plain.items()},
                len(strategies),
                (search_end - clock()) * FIRST_TRIALS_SHARE,
            )
            promising: Mapping[tuple[str, str], list[Trial]] = {}
            if predictor is not None:
                spending.begin("replay")
                doing("trying settings against the recorded answers")
                end = clock() + REPLAY_SHARE * max(0.0, search_end - clock())
                tried = presearch(
                    predictor,
                    replaying,
                    {
                        name: [p for p in recorded if p.prompt_class == name]
                        for name in usable
                    },
                    in_time=lambda: clock() < end,
                    clock=clock,
                    warn=warn,
                    seed=seed,
                )
                promising = tried.best
                for key, record in as_records(tried).items():
                    store.put_record(run, key, record)
                warn(
                    f"replay: {tried.trials} settings tried without the target in "
                    f"{tried.seconds:.0f} s"
                )
            for cls in strategies:
                for name, prompts in usable.items():
                    best = promising.get((name, cls.name), [])
                    search.add(name, cls, prompts, plain, best)
            spending.begin("trials")
            open_search(store, run, usable)
            untried = search.search()
            close_search(store, run)
            for line in untried_lines(untried):
                warn(line)
            # A run that is continued begins with the classes it has no result of.
            done = {p.prompt_class for p in store.profiles(run=run)}
            names = sorted(held_out.classes, key=lambda name: name in done)
            for index, name in enumerate(names):
                # Of one prompt with one setting, if it is no slower than plain.
                once = median(
                    [s.seconds for p, s in _of_class(plain, tuning, name)] or [0.0]
                )
                share = (deadline - clock()) / (len(names) - index)
                finalists = _finalists(
                    [a for a in search.arms if a.prompt_class == name],
                    _settings_in(share, once) - 1 - len(baselines),
                )
                expected = (1 + len(finalists) + len(baselines)) * once
                if index and clock() + FEWEST_PROMPTS * expected > deadline:
                    left = ", ".join(names[index:])
                    warn(f"no time to confirm {left}; the same command continues")
                    break
                spending.begin("confirm")
                doing(f"{name}: confirming on held-out prompts")
                confirmed = confirm(
                    measurer,
                    [*finalists, *baselines],
                    held_out.by_class()[name],
                    repeats=REPEATS,
                    in_time=_until(clock, clock() + share, deadline),
                    warn=warn,
                    objective=objective,
                    clock=clock,
                    expected=expected,
                )
                if not confirmed:
                    warn(f"{name}: plain decoding ends at once; nothing to compare")
                    continue
                predicted: Mapping[str, float] = {}
                if replayer is not None:
                    spending.begin("replay")
                    predicted = _predict(
                        replayer,
                        replaying,
                        held_out.by_class()[name],
                        confirmed,
                        worth=lambda seconds: (
                            clock() + seconds <= deadline or seconds <= LATE_PREDICTION
                        ),
                    )
                    store.put_record(run, f"predicted/{name}", predicted)
                now = datetime.now(timezone.utc)
                profiles = [
                    Profile(
                        environment,
                        workload.digest,
                        workload.name,
                        name,
                        found.setting.strategy,
                        dict(found.setting.params),
                        found.measurement,
                        now,
                        lossless=found.lossless and found.setting.strategy not in lossy,
                        baseline=found.setting.baseline,
                        run=run,
                    )
                    for found in confirmed.values()
                ]
                store.put_record(run, f"confirm/{name}", as_record(confirmed))
                store.add_profiles(profiles)
                results.append(
                    ClassResult(
                        name,
                        select(profiles, environment, name),
                        tuple(profiles),
                        trials={
                            a.name: len(a.trials)
                            for a in search.arms
                            if a.prompt_class == name
                        },
                        reused=name in held_out.reused,
                        predicted=predicted,
                    )
                )
            results.sort(key=lambda found: held_out.classes.index(found.name))
            if said := told_errors(
                e for found in results for e in found.prediction_errors
            ):
                warn(f"replay: {said}")
    except KeyboardInterrupt:
        raise Interrupted(result) from None
    finally:
        close_search(store, run)
        spending.end()
        result.spent.update(spending.parts)
    return result


def untried_lines(arms: Sequence[Arm]) -> list[str]:
    """What there was no time for: strategies untried on the same classes in a line."""
    classes: dict[str, list[str]] = {}
    for arm in arms:
        classes.setdefault(arm.name, []).append(arm.prompt_class)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, missed in classes.items():
        groups.setdefault(tuple(missed), []).append(name)
    return [
        f"{', '.join(missed)}: no time for {', '.join(names)}; give a larger --budget"
        for missed, names in groups.items()
    ]


def _unclassed(workload: Workload) -> Workload:
    prompts = tuple(replace(p, prompt_class=DEFAULT_CLASS) for p in workload.prompts)
    return replace(workload, prompts=prompts)


def _classifier(
    store: ProfileStore,
    run: str,
    predictor: Replayer | None,
    strategies: Sequence[type[Strategy]],
    prompts: Sequence[Prompt],
    *,
    in_time: Callable[[], bool],
    seed: int,
    states: ReadsStates | None,
) -> Classifier:
    """The run's, or one learnt from what replays say of each prompt; stored."""
    if (record := store.record(run, CLASSIFIER)) is not None:
        # Learnt anew it might differ, and the run's trials are of these classes.
        return Classifier.from_json(record)
    gains: dict[str, dict[str, float]] = {}
    if predictor is not None:
        settings = [setting for cls in strategies for setting in probed(cls)]
        gains = replayed_gains(predictor, settings, prompts, in_time)
    found = discover(prompts, gains, seed, states)
    store.put_record(run, CLASSIFIER, found.classifier.as_json())
    return found.classifier


def _of_class(
    plain: Mapping[str, Sample], workload: Workload, name: str
) -> list[tuple[Prompt, Sample]]:
    prompts = workload.by_class().get(name, ())
    return [(p, plain[p.id]) for p in prompts if p.id in plain]


def _predict(
    replayer: Callable[[Sequence[tuple[Prompt, Sample]]], Replayer | None],
    strategies: Sequence[type[Strategy]],
    held_out: Sequence[Prompt],
    confirmed: Mapping[str, Confirmed],
    *,
    worth: Callable[[float], bool],
) -> dict[str, float]:
    """Predict what was just confirmed, on the same prompts.

    Args:
        worth: Whether there is time for so many seconds of drafting.

    Returns:
        Setting key -> how much better than plain decoding in the objective.
    """
    names = {cls.name for cls in strategies}
    plain = confirmed[PLAIN_SETTING.key].samples
    prompts = [p for p in held_out if plain.get(p.id)]
    told = sorted(
        (
            f
            for f in confirmed.values()
            if f.setting.strategy in names and not f.setting.baseline
        ),
        key=lambda f: f.measurement.seconds_draft,
    )
    predictor = replayer([(p, typical(plain[p.id])) for p in prompts]) if told else None
    if predictor is None:
        return {}
    bare = {p.id: predictor.measure(PLAIN_SETTING, p) for p in prompts}
    predicted: dict[str, float] = {}
    for found in told:
        repeats = max(1, max(map(len, found.samples.values()), default=1))
        if not worth(found.measurement.seconds_draft / repeats):
            break
        predictor.forget()
        gains = [
            [
                max(
                    predictor.measure(found.setting, p).gain(
                        bare[p.id], found.measurement.objective
                    ),
                    1e-6,
                )
            ]
            for p in prompts
        ]
        predicted[found.setting.key] = overall(gains)
    return predicted


def _stale(store: ProfileStore, environment: Environment) -> str:
    """Why profiles of this model taken before no longer hold; empty if they do."""
    before = [
        p.environment
        for p in store.profiles()
        if p.environment.model_name == environment.model_name
    ]
    if not before:
        return ""
    if all(place.model != environment.model for place in before):
        return (
            f"the weights of {environment.model_name} changed since it was profiled; "
            "measuring again"
        )
    here = [place for place in before if place.key() == environment.key()]
    if here and (changed := stale_versions(here[0], environment)):
        return f"its profiles are stale ({changed}); measuring again"
    return ""


def affordable(
    prompts: Sequence[Prompt],
    seconds: Mapping[str, float],
    strategies: int,
    budget: float,
) -> dict[str, list[Prompt]]:
    """The prompts of each class that trials run on: all, or as many as time allows.

    One trial of every strategy on them takes about ``budget`` seconds at most; a class
    keeps one prompt at least. A strategy seen on one prompt may still be confirmed, one
    never tried can't.

    Args:
        seconds: Prompt id -> what plain decoding took.
    """
    classes: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        classes.setdefault(prompt.prompt_class, []).append(prompt)
    whole = strategies * sum(seconds[prompt.id] for prompt in prompts)
    share = min(1.0, max(0.0, budget) / whole) if whole > 0 else 1.0
    return {
        name: found[: max(1, int(len(found) * share))]
        for name, found in classes.items()
    }


def run_id(
    environment: Environment, workload: Workload, options: Mapping[str, Any]
) -> str:
    """Equal for runs whose trials may be mixed: one is continued by the other."""
    parts = [
        list(environment.place()),
        dict(environment.versions),
        workload.digest,
        dict(options),
    ]
    if environment.heads is not None:
        parts.append(environment.heads)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _plain(
    search: Search,
    tuning: Workload,
    in_time: Callable[[], bool],
    warn: Callable[[str], None],
) -> dict[str, Sample]:
    """Plain decoding of the tuning prompts, the classes in turn."""
    measured: dict[str, Sample] = {}
    prompts = tuning.limit(len(tuning.prompts)).prompts
    for index, prompt in enumerate(prompts):
        if index >= len(tuning.classes) and not in_time():
            warn(f"tuned on {index} of {len(prompts)} prompts; the budget is small")
            break
        sample = search.plain(prompt)
        if sample.speed > 0:
            measured[prompt.id] = sample
    return measured


def _settings_in(seconds: float, once: float) -> int:
    """How many settings can be confirmed on as many prompts as a choice takes."""
    if math.isinf(seconds) or once <= 0:
        return FINALISTS + 1
    return int(seconds / (FEWEST_PROMPTS * once))


def _until(
    clock: Callable[[], float], share: float, deadline: float
) -> Callable[[float, int], bool]:
    """Whether a prompt may begin; as many as a choice takes may use others' time."""

    def in_time(seconds: float, prompts: int) -> bool:
        return clock() + seconds <= (share if prompts >= FEWEST_PROMPTS else deadline)

    return in_time


def _finalists(arms: Sequence[Arm], most: int = FINALISTS) -> list[Setting]:
    """The best setting of the best strategies; hopeless ones only for want of any.

    Of a strategy that there was no time to try, what the replay promises most of.

    Args:
        most: How many there is time for; one is taken anyway.
    """
    most = min(FINALISTS, max(1, most))
    found: list[tuple[float, Setting]] = []
    for arm in arms:
        if arm.best is not None:
            found.append((arm.ratio, Setting(arm.name, dict(arm.best.params))))
        elif not arm.trials and arm.predicted:
            key = max(arm.predicted, key=lambda key: arm.predicted[key])
            found.append((arm.predicted[key], Setting.from_key(key)))
    ranked = sorted(found, key=lambda pair: -pair[0])
    worth = [pair for pair in ranked if pair[0] >= HOPELESS][:most] or ranked[:1]
    return [setting for _, setting in worth]


def _opened(host: Host, db: str | ProfileStore | None) -> ProfileStore:
    if isinstance(db, str) and db.startswith(f"{SCHEME}://"):
        return open_remote(db)
    return host.open_store(db) if db is None or isinstance(db, str) else db


def _are_paths(*models: Any) -> bool:
    return all(model is None or isinstance(model, str | Path) for model in models)


def _chosen(
    host: Host, names: Sequence[str] | None, allow_lossy: bool
) -> list[type[Strategy]]:
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
                f"{name} is lossy: it changes the law of sampled output; add "
                "--allow-lossy (allow_lossy=True) to measure it"
            )
    return [known[n] for n in dict.fromkeys(names) if n != PLAIN]


def _limited(workload: Workload, limit: int | None) -> Workload:
    if limit is None:
        return workload
    if limit < 1:
        raise AdaptSpecError(f"limit must be 1 prompt per class or more, got {limit}")
    kept: list[Prompt] = []
    for prompts in workload.by_class().values():
        kept.extend(prompts[:limit])
    return replace(workload, prompts=tuple(kept))


def _shortened(workload: Workload, most: int) -> Workload:
    """The examples with shorter answers: the first try should end soon."""
    prompts = [
        replace(p, max_new_tokens=min(p.max_new_tokens or most, most))
        for p in workload.prompts
    ]
    return replace(workload, prompts=tuple(prompts))


def _defaults(cls: Any) -> dict[str, Any]:
    return dict(cls.Params().model_dump())
