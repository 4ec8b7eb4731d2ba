"""The phase of a tune in which its classes are discovered, once a run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from adaptspec.classes.classifier import Classifier
from adaptspec.errors import AdaptSpecError
from adaptspec.workloads import Prompt, Workload
from adaptspec_tuner.classes.discover import (
    classified,
    discover,
    known_only,
    probed,
    replayed_gains,
)
from adaptspec_tuner.records import CLASSIFIER
from adaptspec_tuner.tuning_run import TuningRun

if TYPE_CHECKING:
    from adaptspec_tuner.replaying.replayer import Replayer


def discover_classes(
    run: TuningRun,
    predictor: Replayer | None,
    recorded: Collection[str],
    tuning: Workload,
    held_out: Workload,
) -> tuple[Workload, Workload]:
    """Both workloads by class, without prompts of no class that was tuned on.

    Args:
        recorded: Ids of the tuning prompts that classes are learnt from.
    """
    run.begin("classes")
    run.doing("discovering classes")
    learnt_from = [p for p in tuning.prompts if p.id in recorded]
    classifier = _classifier(run, predictor, learnt_from)
    tuning = classified(tuning, classifier)
    held_out = classified(held_out, classifier)
    tuning, odd = known_only(tuning, tuning.classes)
    held_out, strange = known_only(held_out, tuning.classes)
    for part, left_out in (("tuning", odd), ("held-out", strange)):
        if left_out:
            run.warn(
                f"{len(left_out)} of the {part} prompts are of no class "
                "that was tuned on, and decoded plainly: "
                f"{', '.join(left_out)}"
            )
    for line in classifier.describe():
        run.warn(f"class {line}")
    return tuning, held_out


def _classifier(
    run: TuningRun, predictor: Replayer | None, prompts: Sequence[Prompt]
) -> Classifier:
    """The run's, or one learnt from what replays say of each prompt; stored."""
    if (record := run.store.record(run.id, CLASSIFIER)) is not None:
        # Learnt anew it might differ, and the run's trials are of these classes.
        try:
            return Classifier.from_json(record)
        except AdaptSpecError as error:
            raise AdaptSpecError(
                f"the classes that run {run.id} found can't be read: {error}; begin it "
                "anew with --fresh"
            ) from error
    gains: dict[str, dict[str, float]] = {}
    if predictor is not None:
        settings = [setting for cls in run.given.replaying for setting in probed(cls)]
        gains = replayed_gains(predictor, settings, prompts, run.time.discovering())
    found = discover(prompts, gains, run.options.seed)
    run.store.put_record(run.id, CLASSIFIER, found.classifier.as_json())
    return found.classifier
