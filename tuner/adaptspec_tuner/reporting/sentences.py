"""A tuning run in words: what was gained, what is chosen and why, how to use it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptspec.cli.quantities import clock_time
from adaptspec.profile import ANSWER, EVERY_CLASS, LATENCY, OURS, PLAIN, SPEED
from adaptspec.selector import FEWEST_PROMPTS
from adaptspec_tuner.reporting.result import told_errors

if TYPE_CHECKING:
    from adaptspec_tuner.reporting.result import ClassResult, Row, TuneResult
    from adaptspec_tuner.reporting.usage import Usage

# Objective -> what a ratio is about.
ABOUT = {
    ANSWER: "time of the whole answer, the prompt's reading and drafting included",
    SPEED: "decoding speed, without the prefill",
    LATENCY: "95th percentile of the time per token",
}


def opening(result: TuneResult) -> list[str]:
    """What was gained, then a sentence over all classes and one for each."""
    lines = [gain(result)] if result.named else []
    pooled = [result.pooled] if result.pooled is not None else []
    return lines + [sentence(found) for found in (*pooled, *result.named)]


def gain(result: TuneResult) -> str:
    """How much faster the workload is decoded with the choice of each class."""
    ratios = [
        won.measurement.ratio
        for found in result.named
        if (won := found.winner) is not None and found.choice.strategy != PLAIN
    ]
    count = len(result.named)
    if result.usage is not None and "://" in result.usage.engine:
        return "Measured as it is: there was nothing to choose from."
    if all(found.choice.strategy == PLAIN for found in result.named):
        return "Nothing was reliably faster than plain decoding, so that is chosen."
    if not ratios:
        return "What earlier runs chose stays in use: they have the better evidence."
    ratios += [1.0] * (count - len(ratios))
    mean = math.exp(sum(map(math.log, ratios)) / count)
    over = f" (geometric mean of {count} classes)" if count > 1 else ""
    if result.objective == LATENCY:
        what = f"the slowest tokens come {mean:.2f} times as fast as with"
    else:
        done = "decoded" if result.objective == SPEED else "answered"
        what = f"your prompts are {done} {mean:.2f} times as fast as with"
    return f"With what is chosen, {what} plain decoding{over}."


def sentence(found: ClassResult) -> str:
    """``json: hybrid, 2.13x [1.62..2.71], 4 prompts``."""
    won = found.winner
    prompts = max((p.measurement.prompts for p in found.profiles), default=0)
    counted = f"{prompts} prompt" + ("" if prompts == 1 else "s")
    if found.choice.strategy == PLAIN:
        return f"{shown_class(found.name)}: plain decoding, {counted}"
    if won is None:
        kept = f"{found.choice.strategy}, kept from run {found.choice.run}"
        return f"{shown_class(found.name)}: {kept}, {counted}"
    return f"{shown_class(found.name)}: {label(won)}, {ratio(won, 'x')}, {counted}"


def at_a_load(found: ClassResult) -> str:
    """``ngram 1.43x, 31.0/s``: what is chosen of a class, and its speed."""
    won = found.winner
    if won is None:
        return found.choice.strategy
    speed = f"{won.measurement.tokens_per_second:.1f}/s"
    if won.strategy == PLAIN:
        return f"plain decoding, {speed}"
    return f"{label(won)} {won.measurement.ratio:.2f}x, {speed}"


def shown_class(name: str) -> str:
    """The result over all classes is kept under a name that no class has."""
    return "all classes" if name == EVERY_CLASS else name


def heading(result: TuneResult) -> str:
    """Model, machine and workload."""
    place = result.environment
    beside = ", ".join(filter(None, (place.draft_name, place.heads_name)))
    draft = f" with {beside}" if beside else ""
    engine = "" if place.engine == OURS else f"{place.decoded_by}, "
    threads = f"{place.threads} thread{'' if place.threads == 1 else 's'}, "
    if not place.threads:  # a server doesn't tell
        threads = ""
    return (
        f"{engine}{place.model_name}{draft}, {place.dtype}, {place.device_name}, "
        f"{threads}held-out prompts of {result.workload}"
    )


def label(row: Row) -> str:
    """The strategy's name with what must be known of it."""
    marks = " (baseline)" if row.profile.baseline else ""
    return row.strategy + marks + ("" if row.profile.lossless else " (NOT LOSSLESS)")


def parameters(params: Mapping[str, object]) -> str:
    """Names and values, floats shortened."""
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in params.items()
    )


def ratio(row: Row, unit: str = "") -> str:
    """With its interval, if that is known."""
    shown = f"{row.measurement.ratio:.2f}{unit}"
    return f"{shown} {interval(row)}" if row.interval else shown


def interval(row: Row) -> str:
    """``[1.62..2.71]``; empty where it isn't known."""
    if row.interval is None:
        return ""
    low, high = row.interval
    return f"[{low:.2f}..{high:.2f}]"


def predicted(row: Row) -> str:
    """The replay's ratio and how far off it was; empty without one."""
    if row.predicted is None:
        return ""
    error = row.prediction_error
    return f"{row.predicted:.2f}" + ("" if error is None else f" ({error:+.1%})")


def identical(row: Row) -> str:
    """On how many prompts plain decoding's tokens came out, near ties added."""
    m = row.measurement
    if m.sampled:  # what differs isn't wrong, so it wasn't compared
        return "sampled"
    ties = f" (+{m.near_ties})" if m.near_ties else ""
    return f"{m.identical}/{m.prompts}{ties}"


def oracle(found: ClassResult) -> str:
    """What choosing by prompt would add; empty where it isn't known."""
    if found.oracle is None:
        return ""
    return (
        f"one setting for all its prompts: {found.oracle.fixed:.2f}x "
        f"({found.oracle.strategy}); the best for each prompt: "
        f"{found.oracle.best:.2f}x ({found.oracle.gap:+.1%})"
    )


def repaid(result: TuneResult, found: ClassResult) -> str:
    """When this class alone repays its part of the tuning; empty where it doesn't."""
    tokens = result.own_break_even(found)
    if tokens is None:
        return ""
    return (
        f"its equal part of the tuning is repaid after {tokens:,.0f} tokens "
        "of this class"
    )


def remarks(result: TuneResult) -> list[str]:
    """What must be known of the figures, and what couldn't run."""
    lines = []
    if any(found.reused for found in result.classes):
        lines.append("* one prompt only: reported on what it was tuned on")
    if few := [found.name for found in result.named if found.few]:
        lines.append(
            f"too few held-out prompts: {', '.join(few)}: a strategy is chosen on "
            f"{FEWEST_PROMPTS} or more, so give {2 * FEWEST_PROMPTS} prompts a class "
            "or more, half are held out, and a budget that confirms them"
        )
    for found in result.classes:
        more = (oracle(found), repaid(result, found))
        lines.extend(f"{shown_class(found.name)}: {text}" for text in more if text)
    for name, reason in result.unavailable.items():
        lines.append(f"not run: {name}: {reason}")
    return lines


def summary(result: TuneResult) -> list[str]:
    """Cost, break-even and how good the predictions were."""
    lines = []
    if result.spent:
        parts = ", ".join(f"{part} {clock_time(s)}" for part, s in result.spent.items())
        lines.append(f"Tuning took {clock_time(sum(result.spent.values()))} ({parts}).")
        lines.append(
            "Nothing was found that repays it."
            if result.break_even is None
            else f"It is repaid after {result.break_even:,.0f} tokens of use, the "
            "classes in equal parts."
        )
    else:
        lines.append("What tuning took was not recorded.")
    tried = [trial for found in result.classes for trial in found.tried]
    if replayed := sum(trial.replayed for trial in tried):
        lines.append(
            f"{len(tried) - replayed} settings were measured in the search, {replayed} "
            "replayed against recorded answers."
        )
    if told := told_errors(result.prediction_errors):
        lines.append(f"Replay: {told}.")
        # What is over all classes was confirmed class by class.
        rows = [row for found in result.named for row in found.rows]
        without = {
            row.strategy
            for row in rows
            if row.predicted is None
            and row.strategy != PLAIN
            and not row.profile.baseline
        }
        if without:
            lines.append(
                f"Without a prediction: {', '.join(sorted(without))} (the record lacks "
                "what they read of the target, or time was up)."
            )
    if result.classifier is not None:
        lines.append(result.classifier["told_in_words"])
    return lines


def next_of(usage: Usage) -> dict[str, Any]:
    """What to type next, by what it is typed in."""
    if usage.ours:
        return {"command": usage.command(), "python": usage.python()}
    return {"command": line} if (line := usage.export()) else {}


def as_json(result: TuneResult) -> dict[str, Any]:
    """The result as plain data, with what is said of it and what to type next."""
    usage = result.usage
    return {
        "said": opening(result),
        "next": usage and next_of(usage),
        **result.as_json(),
    }
