"""A tune's phases in turn: plain decoding, replays, search, classes, confirmation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adaptspec.errors import AdaptSpecError, ProfileStoreError, stopped_by_user
from adaptspec.profile import Environment, ProfileStore
from adaptspec.selector import stale_versions
from adaptspec.workloads import Prompt, Workload, split
from adaptspec_tuner.classes.learn import learn
from adaptspec_tuner.confirming.finalists import confirm_classes, least_confirmation
from adaptspec_tuner.distributed.workers import close_search, open_search
from adaptspec_tuner.measuring.profiler import Sample, in_a_line
from adaptspec_tuner.records import CLASSIFIER
from adaptspec_tuner.replaying.presearch import as_records, presearch
from adaptspec_tuner.reporting.result import TuneResult, told_errors
from adaptspec_tuner.searching.search import Arm
from adaptspec_tuner.tuning_run import Interrupted, Stopped, TuningRun

if TYPE_CHECKING:
    from adaptspec_tuner.replaying.replayer import Replayer


def tune_with(run: TuningRun) -> TuneResult:
    """Find the fastest strategy for each class.

    Raises:
        Interrupted: on Ctrl-C.
        Stopped: if it ended on its way, or not all that it found could be stored.
    """
    if changed := _stale(run.store, run.environment):
        run.warn(changed)
    # Whatever the seed: whoever tries several must not have tuned on what is held out.
    tuning, held_out = split(run.workload)
    try:
        with run.progress:
            plain = _decode_plainly(run, tuning)
            # A strategy that is found is of no use unless there is time to confirm it.
            run.time.keep_back(least_confirmation(run, tuning, held_out, plain))
            predictor = _predictor(run, tuning, plain)
            _search(run, predictor, tuning, plain)
            _learn_classes(run)
            confirm_classes(run, tuning, held_out, plain)
            if said := told_errors(run.result.prediction_errors):
                run.warn(f"replay: {said}")
    except BaseException as error:
        if stopped_by_user(error):
            raise Interrupted(run.result) from None
        if (reason := _in_words(error, run.store)) is None:
            raise
        kept = "" if run.unstored else "; what was measured is kept"
        raise Stopped(f"{reason}{kept}", run.result) from error
    finally:
        run.keep(lambda: close_search(run.store, run.id))
        run.keep(run.spending.end)
        run.result.spent.update(run.spending.parts)
    if run.unstored is not None:
        raise Stopped(
            f"not all of it is stored: {run.unstored}; the same command measures again "
            "what is missing",
            run.result,
        ) from run.unstored
    return run.result


def _in_words(error: BaseException, store: ProfileStore) -> str | None:
    """What ended a tune, in a line; None for what only a traceback explains."""
    if isinstance(error, AdaptSpecError):
        return str(error)
    if type(error).__module__.partition(".")[0] in ("optuna", "sqlalchemy"):
        cause = error.__cause__ or error
        return (
            f"can't use the profile database {store.url}: "
            f"{in_a_line(getattr(cause, 'orig', None) or cause)}; mend it or give "
            "another --db"
        )
    # Of torch and the operating system: no memory, no device, no space.
    if isinstance(error, OSError | MemoryError | RuntimeError):
        return in_a_line(error)
    return None


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


def _decode_plainly(run: TuningRun, tuning: Workload) -> dict[str, Sample]:
    """Plain decoding of the tuning prompts by their ids, the classes in turn."""
    run.begin("plain")
    measured: dict[str, Sample] = {}
    failed: Exception | None = None
    prompts = tuning.limit(len(tuning.prompts)).prompts
    for index, prompt in enumerate(prompts):
        if index >= len(tuning.classes) and not run.time.decoding_plainly:
            run.warn(f"tuned on {index} of {len(prompts)} prompts; the budget is small")
            break
        try:
            sample = run.search.plain(prompt)
        except ProfileStoreError:
            raise
        # A model's own code may raise anything; the other prompts are tuned on.
        except Exception as error:
            if stopped_by_user(error):
                raise
            failed = error
            run.warn(f"prompt {prompt.id!r} is left out: {in_a_line(error)}")
            continue
        if sample.speed > 0:
            measured[prompt.id] = sample
    if failed is not None and not measured:
        raise failed
    return measured


def _predictor(
    run: TuningRun, tuning: Workload, plain: Mapping[str, Sample]
) -> Replayer | None:
    if run.replayer is None or not run.replaying or not run.time.searching:
        return None
    run.begin("costs")
    recorded = [(p, plain[p.id]) for p in tuning.prompts if p.id in plain]
    try:
        return run.replayer(recorded)
    except ProfileStoreError:
        raise
    # Timing forwards behind long contexts may take more memory than there is.
    except Exception as error:
        if stopped_by_user(error):
            raise
        run.warn(f"replay: left out: {in_a_line(error)}")
        return None


def _search(
    run: TuningRun,
    predictor: Replayer | None,
    tuning: Workload,
    plain: Mapping[str, Sample],
) -> None:
    """Trials of every strategy for every class; workers may join."""
    recorded = [p for p in tuning.prompts if p.id in plain]
    usable = affordable(
        recorded,
        {key: sample.seconds for key, sample in plain.items()},
        len(run.strategies),
        run.time.for_first_trials(),
    )
    tried = None
    if predictor is not None:
        run.begin("replay")
        run.doing("trying settings against the recorded answers")
        tried = presearch(
            predictor,
            run.replaying,
            {name: [p for p in recorded if p.prompt_class == name] for name in usable},
            in_time=run.time.replaying(len(run.replaying) / len(run.strategies)),
            clock=run.clock,
            warn=run.warn,
            seed=run.options.seed,
        )
        for key, record in as_records(tried).items():
            run.store.put_record(run.id, key, record)
        run.warn(
            f"replay: {tried.trials} settings tried without the target in "
            f"{tried.seconds:.0f} s"
        )
    for cls in run.strategies:
        for name, prompts in usable.items():
            best = tried.best.get((name, cls.name), []) if tried else []
            run.search.add(name, cls, prompts, plain, best)
    run.begin("trials")
    open_search(run.store, run.id, usable)
    untried = run.search.search()
    close_search(run.store, run.id)
    for line in untried_lines(untried):
        run.warn(line)


def _learn_classes(run: TuningRun) -> None:
    """Learn from all prompts to tell their classes in use, and store that."""
    run.begin("classes")
    found = learn(run.workload.prompts)
    if found is not None:
        run.keep(lambda: run.store.put_record(run.id, CLASSIFIER, found.as_json()))
        run.warn(found.evidence.describe())


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
