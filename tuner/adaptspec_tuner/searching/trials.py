"""One trial: a setting of a strategy, measured and checked on a class's prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptspec.errors import AdaptSpecError, stopped_by_user
from adaptspec.params import Params, Scalar
from adaptspec.profile import SPEED, Trial
from adaptspec_tuner.measuring.profiler import Measurer, Sample, Setting

if TYPE_CHECKING:
    from adaptspec.workloads import Prompt


@dataclass(frozen=True, eq=False)
class Job:
    """What a trial measures; can be sent to another machine.

    Args:
        plain: Prompt id -> plain decoding.
        predicted: The ratio that a replay promised, if it was replayed.
    """

    run: str
    prompt_class: str
    strategy: str
    number: int
    space: type[Params]
    params: Mapping[str, Scalar]
    prompts: Sequence[Prompt]
    plain: Mapping[str, Sample]
    objective: str = SPEED
    predicted: float | None = None


def run_trial(
    measurer: Measurer,
    job: Job,
    report: Callable[[int, float], bool],
    warn: Callable[[str], None],
) -> Trial:
    """Measure it prompt by prompt; what fails or changes an output is recorded so.

    Args:
        report: Told the running ratio after each prompt; whether to give it up.
    """
    detail: dict[str, Any] = {"ratios": [], "running": [], "near_ties": 0}
    speeds: list[float] = []
    name, params = job.strategy, dict(job.params)
    if job.predicted is not None:
        detail["predicted"] = job.predicted
    measurer.forget()

    def finished(state: str) -> Trial:
        value = median(speeds) if speeds and state != "failed" else None
        if detail["running"]:
            detail["ratio"] = detail["running"][-1]
        return Trial(
            job.run, job.prompt_class, name, job.number, params, state, value, detail
        )

    for step, prompt in enumerate(job.prompts):
        plain = job.plain[prompt.id]
        try:
            job.space.parse(params, name)
            sample = measurer.measure(Setting(name, params), prompt)
            agreement = measurer.agreement(prompt, plain.tokens, sample.tokens)
        # A third party's strategy may raise anything; the search goes on.
        except Exception as error:
            if stopped_by_user(error):
                raise
            detail["error"] = f"{type(error).__name__}: {error}"
            if not isinstance(error, AdaptSpecError):
                warn(f"{name} {params} failed: {detail['error']}")
            return finished("failed")
        if agreement == "mismatch":
            detail["error"] = f"mismatch: prompt {prompt.id!r}"
            warn(
                f"NOT LOSSLESS: {name} {params} changed the output of prompt "
                f"{prompt.id!r}; the setting is disqualified"
            )
            return finished("failed")
        detail["near_ties"] += agreement == "near_tie"
        speeds.append(sample.speed)
        detail["ratios"].append(sample.gain(plain, job.objective))
        running = _geometric_mean(detail["ratios"])
        detail["running"].append(running)
        if report(step, running) and step + 1 < len(job.prompts):
            return finished("pruned")
    return finished("complete")


def _geometric_mean(ratios: Sequence[float]) -> float:
    # A prompt whose draft run ended at once has speed 0.
    return math.exp(sum(math.log(max(r, 1e-6)) for r in ratios) / len(ratios))
