"""One tune from top to bottom: each phase is a function from values to values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptspec.errors import AdaptSpecError, ProfileStoreError, stopped_by_user
from adaptspec.params import Scalar
from adaptspec.profile import EVERY_CLASS, Environment, ProfileStore
from adaptspec.run_records import USAGE, from_anywhere
from adaptspec.selector import stale_versions
from adaptspec.workloads import Prompt, Workload, split
from adaptspec_tuner.classes.learn import learn
from adaptspec_tuner.confirming.classes import confirm_classes, stored_class
from adaptspec_tuner.confirming.decided import decided
from adaptspec_tuner.confirming.finalists import FINALISTS, finalists_of
from adaptspec_tuner.confirming.kept import kept_class
from adaptspec_tuner.confirming.time_needed import (
    confirming_takes,
    finalists_take,
    shortest_confirmation,
)
from adaptspec_tuner.distributed.workers import KeepsStudies, close_search, open_search
from adaptspec_tuner.measuring.profiler import PLAIN_SETTING, Sample, in_a_line
from adaptspec_tuner.records import CLASSIFIER, DEFAULTS, MIX, plain_key
from adaptspec_tuner.replaying.presearch import TRIALS, Presearch, as_records, presearch
from adaptspec_tuner.reporting.result import TuneResult, told_errors
from adaptspec_tuner.searching.entrants import (
    common_settings,
    earlier_settings,
    entrants,
)
from adaptspec_tuner.searching.search import Arm, Search
from adaptspec_tuner.searching.space import defaults
from adaptspec_tuner.searching.sweeps import Costs, ask_each, sweep_all
from adaptspec_tuner.tuning_run import Interrupted, Stopped, TuneInputs, TuningRun

if TYPE_CHECKING:
    from adaptspec_tuner.replaying.replayer import Replayer


def tune_with(given: TuneInputs) -> TuneResult:
    """Find the fastest strategy for each class.

    Raises:
        Interrupted: on Ctrl-C.
        Stopped: if it ended on its way, or not all that it found could be stored.
    """
    run = TuningRun(given)
    if changed := _stale(run.store, run.environment):
        run.warn(changed)
    run.keep(lambda: run.store.put_record(run.id, MIX, given.workload.counts))
    if given.usage is not None:  # now: what is killed later has chosen something, too
        asked = from_anywhere(given.usage.as_json())
        run.keep(lambda: run.store.put_record(run.id, USAGE, asked))
    usual = _engine_defaults(run)
    # Whatever the seed: whoever tries several must not have tuned on what is held out.
    tuning, held_out = split(given.workload)
    result = TuneResult(
        run=run.id,
        environment=run.environment,
        workload=given.workload.name,
        db=run.store.url,
        classes=[],
        notes=run.notes,
        unavailable=dict(given.unavailable),
        usage=given.usage,
        defaults=usual,
    )
    try:
        with run.progress:
            plain = plain_decodings(run, tuning)
            # A strategy that is found is of no use unless there is time to confirm it.
            run.time.keep_back(*confirming_takes(run, tuning, held_out, plain))
            warn_of_short_budget(run, finalists_take(run, tuning, held_out, plain))
            replayer = replayer_of(run, tuning, plain)
            # The classes in turn, so that any first prompts are of all kinds.
            mixed = tuning.limit(len(tuning.prompts)).prompts
            recorded = [p for p in mixed if p.id in plain or run.given.of_engine]
            over_all = replayed_over_all(run, replayer, recorded)
            common = common_settings(given.strategies, over_all)
            replayed = replayed_by_class(run, replayer, recorded, common)
            search, shared = raced(run, tuning, recorded, plain, common, replayed)
            learn_classes(run)
            finalists = finalists_of(run, search, shared)
            records: dict[str, dict[str, Any]] = {}
            for name, confirmed in confirm_classes(
                run, finalists, tuning, held_out, plain
            ):
                found, records[name] = kept_class(
                    run, search.arms, held_out, name, confirmed
                ) or stored_class(run, search.arms, held_out, name, confirmed)
                # After each class, so that a tune that is stopped keeps its choices.
                result.classes[:] = decided(run, [*result.classes, found], records)
            if said := told_errors(result.prediction_errors):
                run.warn(f"replay: {said}")
    except BaseException as error:
        if stopped_by_user(error):
            raise Interrupted(result) from None
        if (reason := _in_words(error, run.store)) is None:
            raise
        kept = "" if run.unstored else "; what was measured is kept"
        raise Stopped(f"{reason}{kept}", result) from error
    finally:
        run.keep(lambda: close_search(run.store, run.id))
        run.keep(run.spending.end)
        result.spent.update(run.spending.parts)
        order = [*held_out.classes, EVERY_CLASS]
        result.classes.sort(key=lambda found: order.index(found.name))
    if run.unstored is not None:
        raise Stopped(
            f"not all of it is stored: {run.unstored}; the same command measures again "
            "what is missing",
            result,
        ) from run.unstored
    return result


def _engine_defaults(run: TuningRun) -> dict[str, dict[str, Any]]:
    """Method -> its parameters' defaults, kept for whoever reads the run: only an
    engine that is open tells its methods. Empty of ours."""
    if not run.given.of_engine:
        return {}
    found = {cls.name: defaults(cls.Params) for cls in run.given.strategies}
    kept = {**(run.store.record(run.id, DEFAULTS) or {}), **found}
    run.keep(lambda: run.store.put_record(run.id, DEFAULTS, kept))
    return kept


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
        and p.environment.engine == environment.engine
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


def plain_decodings(run: TuningRun, tuning: Workload) -> dict[str, Sample]:
    """Plain decoding of the tuning prompts by their ids, the classes in turn."""
    run.begin("plain")
    measured: dict[str, Sample] = {}
    failed: Exception | None = None
    prompts = tuning.limit(len(tuning.prompts)).prompts
    if run.given.of_engine:  # then it only tells what confirming takes
        prompts = tuning.limit(len(tuning.classes)).prompts
    for index, prompt in enumerate(prompts):
        if index >= len(tuning.classes) and not run.time.decoding_plainly:
            run.warn(f"tuned on {index} of {len(prompts)} prompts; the budget is small")
            break
        try:
            sample = _plain(run, prompt)
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


def _plain(run: TuningRun, prompt: Prompt) -> Sample:
    """Plain decoding of ``prompt``, measured once per run."""
    key = plain_key(prompt.prompt_class, prompt.id)
    if (record := run.store.record(run.id, key)) is not None:
        # A damaged record is measured again.
        with suppress(KeyError, TypeError, ValueError):
            return Sample.from_json(record)
    run.doing(f"{prompt.prompt_class}: plain decoding")
    sample = run.given.measurer.measure(PLAIN_SETTING, prompt)
    run.store.put_record(run.id, key, sample.as_json())
    return sample


def warn_of_short_budget(run: TuningRun, confirming: float) -> None:
    """Say which budget would do, if this one is far too short.

    Args:
        confirming: Seconds that are wanted for it.
    """
    wanted = run.time.whole_for(confirming)
    if wanted > 1.25 * run.options.seconds:
        run.warn(
            f"the budget is short: to confirm {FINALISTS} settings in each class takes "
            f"--budget {math.ceil(wanted / 60)}m or so; the same command continues"
        )


def replayer_of(
    run: TuningRun, tuning: Workload, plain: Mapping[str, Sample]
) -> Replayer | None:
    """What predicts from these answers; None where nothing can."""
    make = run.given.replayer
    if make is None or not run.given.replaying or not run.time.searching:
        return None
    run.begin("costs")
    recorded = [(p, plain[p.id]) for p in tuning.prompts if p.id in plain]
    try:
        return make(recorded)
    except ProfileStoreError:
        raise
    # Timing forwards behind long contexts may take more memory than there is.
    except Exception as error:
        if stopped_by_user(error):
            raise
        run.warn(f"replay: left out: {in_a_line(error)}")
        return None


def replayed_over_all(
    run: TuningRun, replayer: Replayer | None, recorded: Sequence[Prompt]
) -> Presearch | None:
    """Trials without the target of every strategy that replays, over all classes."""
    return _replayed(run, replayer, {EVERY_CLASS: recorded}, {}, part=0.4, trials=30)


def replayed_by_class(
    run: TuningRun,
    replayer: Replayer | None,
    recorded: Sequence[Prompt],
    common: Mapping[str, Mapping[str, Scalar]],
) -> Presearch | None:
    """The same of each class, beginning with the settings for all classes."""
    groups = _by_class(recorded)
    first = {name: [params] for name, params in common.items()}
    return _replayed(run, replayer, groups, first, part=1.0, trials=TRIALS)


def _replayed(
    run: TuningRun,
    replayer: Replayer | None,
    groups: Mapping[str, Sequence[Prompt]],
    first: Mapping[str, Sequence[Mapping[str, Scalar]]],
    part: float,
    trials: int,
) -> Presearch | None:
    if replayer is None:
        return None
    run.begin("replay")
    run.doing("trying settings against the recorded answers")
    strategies = run.given.replaying
    tried = presearch(
        replayer,
        strategies,
        groups,
        in_time=run.time.replaying(part * len(strategies) / len(run.given.strategies)),
        clock=run.clock,
        warn=run.warn,
        seed=run.options.seed,
        first=first,
        trials=trials,
        objective=run.options.objective,
    )
    for key, record in as_records(tried).items():
        run.store.put_record(run.id, key, record)
    return tried


def _by_class(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.prompt_class, []).append(prompt)
    return groups


def raced(
    run: TuningRun,
    tuning: Workload,
    recorded: Sequence[Prompt],
    plain: Mapping[str, Sample],
    common: Mapping[str, Mapping[str, Scalar]],
    replayed: Presearch | None,
) -> tuple[Search, Mapping[str, Mapping[str, Scalar]]]:
    """The race of every class's strategies, and the search of the leaders' parameters.

    Workers may join.

    Returns:
        The race, and each strategy's setting for all classes.
    """
    given, options, store = run.given, run.options, run.store
    prompts = _by_class(recorded)

    # Another engine's methods are asked once each as long as any can be confirmed
    # behind it, whatever they take: what that will be isn't known before.
    asking_each = given.of_engine

    def may_try() -> bool:
        most = options.budget_trials
        if most is not None and search.tried >= most:
            return False
        if not asking_each:
            return run.time.searching
        return run.time.left >= costs.of_setting + shortest_confirmation(
            run, tuning, plain
        )

    search = Search(
        given.measurer,
        store,
        run.id,
        in_time=may_try,
        warn=run.warn,
        doing=run.doing,
        seed=options.seed,
        most=options.trials,
        objective=options.objective,
        storage=store.studies() if isinstance(store, KeepsStudies) else None,
        labels={
            "model": run.environment.model_name,
            "workload": given.workload.name,
        },
        pool=given.pool,
        repeats=1 if given.once else 3,
        first=opening_prompts(
            {
                name: [plain[p.id].seconds for p in group if p.id in plain]
                for name, group in prompts.items()
            },
            1 + len(given.strategies),
            run.time.for_opening(),
        ),
    )
    profiles = [p for p in store.profiles() if p.run != run.id]
    earlier = earlier_settings(profiles, run.environment, given.strategies)
    if given.of_engine:
        run.begin("race")
        seconds = {
            name: median([plain[p.id].seconds for p in group if p.id in plain] or [0.0])
            for name, group in prompts.items()
        }
        costs = Costs(seconds, lambda: given.starting, given.at_once)
        ask_each(search, given.strategies, prompts, costs)
        asking_each = False
        common = sweep_all(
            search,
            given.strategies,
            list(prompts),
            costs,
            lambda: run.time.left_for_search if may_try() else 0.0,
            earlier=earlier,
        )
        for line in untried_lines([arm for arm in search.arms if not arm.trials]):
            run.warn(line)
        return search, common
    for cls in given.strategies:
        for name, group in prompts.items():
            opening = entrants(
                *(cls, name, common[cls.name], replayed),
                earlier.get((name, cls.name), ()),
            )
            search.add(
                *(name, cls, group, opening.settings, opening.predicted, opening.count)
            )
    return _raced_on(run, search, prompts), common


def _raced_on(
    run: TuningRun, search: Search, prompts: Mapping[str, Sequence[Prompt]]
) -> Search:
    """The race of all classes to its end."""
    store = run.store
    run.begin("race")
    open_search(store, run.id, prompts)
    untried = search.race()
    close_search(store, run.id)
    for line in untried_lines(untried):
        run.warn(line)
    return search


def learn_classes(run: TuningRun) -> None:
    """Learn from all prompts to tell their classes in use, and store that."""
    run.begin("classes")
    found = learn(run.given.workload.prompts)
    if found is not None:
        # With the time, so that an import replaces an older one.
        now = datetime.now(timezone.utc).isoformat()
        record = {**found.as_json(), "created": now}
        run.keep(lambda: run.store.put_record(run.id, CLASSIFIER, record))
        run.warn(found.evidence.describe())


def opening_prompts(
    seconds: Mapping[str, Sequence[float]], settings: int, budget: float, most: int = 2
) -> int:
    """On how many prompts of each class new settings are measured: at least one.

    Those that open the race of all classes take no longer than ``budget``, if that can
    be; what is left goes to the close ones.

    Args:
        seconds: Class -> what plain decoding of its prompts took.
        settings: That open the race of a class, plain decoding counted.
    """
    once = settings * sum(median(found) for found in seconds.values() if found)
    return most if once <= 0 else max(1, int(min(most, budget / once)))


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
