"""Score settings on a recording of plain decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.generation_fields import ONE_SEQUENCE
from adaptspec.model.hardware_costs import ForwardCosts
from adaptspec.strategy import Observes, union
from adaptspec_tuner.measuring.profiler import (
    PLAIN_SETTING,
    Agreement,
    Recording,
    Sample,
    Setting,
    sample_of,
)
from adaptspec_tuner.replaying.draft import RememberedDraft
from adaptspec_tuner.replaying.reading import RecordedOutputs, read
from adaptspec_tuner.replaying.target import RecordedTarget
from adaptspec_tuner.replaying.virtual_clock import VirtualClock

if TYPE_CHECKING:
    from adaptspec.host import Host
    from adaptspec.strategy import Strategy
    from adaptspec.workloads import Prompt

NOTHING = Observes()
TOPS = 32  # as many as any drafter keeps


class Replayer:
    """Predicts what a ``measuring.profiler.Profiler`` would measure.

    Args:
        engine: Its target, for what isn't its forward, and its draft model.
        host: Where strategies are found.
        costs: Of the target's forwards.
        recordings: By prompt id; those that were timed tell what steps take here.
        draft_costs: Of the draft model's; without them it runs anew in every trial.
        tops: Logits that drafters that read any are shown after each committed token.
            What the target thought of tokens that it didn't choose isn't known, so a
            drafter that learns from those, too, does no better than in a real run.
        observes: What strategies to come will need, too: the target reads a text once.
    """

    def __init__(
        self,
        engine: Engine,
        host: Host,
        costs: ForwardCosts,
        recordings: Mapping[str, Recording],
        draft_costs: ForwardCosts | None = None,
        tops: int = TOPS,
        observes: Observes = NOTHING,
    ) -> None:
        self._host = host
        self._real, self._tops, self._observes = engine.model, tops, observes
        self._readings: dict[str, tuple[Observes, RecordedOutputs]] = {}
        self._clock = VirtualClock()
        self._target = RecordedTarget(engine.model, costs, self._clock)
        draft, remembered = engine.draft, None
        if draft is not None and draft_costs is not None:
            draft = remembered = RememberedDraft(draft, draft_costs, self._clock)
        self._engine = Engine(self._target, draft, self._clock)
        self._recordings = recordings
        self._plain: dict[str, Sample] = {}
        self._strategies: dict[str, Strategy] = {}
        self._controls: dict[int, Controls] = {}
        self._target.scale, self._target.extra = self._seen()
        if remembered is not None:
            remembered.scale = self._target.scale

    def measure(self, setting: Setting, prompt: Prompt) -> Sample:
        """One generation, predicted; plain decoding of a prompt once."""
        if setting != PLAIN_SETTING:
            return self._measure(setting, prompt.id)
        if prompt.id not in self._plain:
            self._plain[prompt.id] = self._measure(setting, prompt.id)
        return self._plain[prompt.id]

    def _seen(self) -> tuple[float, float]:
        """How plain decoding's steps compare with what the costs alone predict.

        Returns:
            The factor of a forward, and the seconds of a step beside it that a replayed
            one doesn't take: medians over the prompts that were timed.
        """
        scales, extras = [], []
        for key, recording in self._recordings.items():
            if not (recording.forwards and recording.seconds_target > 0):
                continue
            bare = self._measure(PLAIN_SETTING, key)
            if not bare.forwards:
                continue
            scales.append(
                (recording.seconds_target / recording.forwards)
                / (bare.seconds_target / bare.forwards)
            )
            extras.append(
                recording.seconds_rest / recording.forwards
                - (bare.seconds_draft + bare.seconds_rest) / bare.forwards
            )
        if not scales:
            return 1.0, 0.0
        return median(scales), max(0.0, median(extras))

    def _measure(self, setting: Setting, prompt: str) -> Sample:
        recording = self._recordings[prompt]
        if setting.key not in self._strategies:
            created = self._host.create(setting.strategy, setting.params)
            # Some find out by a forward, which the stand-in couldn't give.
            type(created).unavailable(self._real, self._engine.draft)
            self._strategies[setting.key] = created
        if recording.most not in self._controls:
            self._controls[recording.most] = Controls.for_model(
                self._target,
                max_new_tokens=recording.most,
                temperature=0.0,
                **ONE_SEQUENCE,
            )
        strategy = self._strategies[setting.key]
        self._target.play(recording, self._read(prompt, strategy))
        return sample_of(
            self._engine.generate(
                strategy, recording.prompt, self._controls[recording.most]
            )
        )

    def _read(self, prompt: str, strategy: Strategy) -> RecordedOutputs | None:
        """What ``strategy`` reads of the target, which runs for it once at most."""
        observes = strategy.observes(self._real)
        if not observes.hidden_layers and not observes.logits:
            return None
        shown = observes.logits
        observes = union([observes, self._observes])
        kept = self._readings.get(prompt)
        if kept is None or not _serves(kept[0], observes):
            reading = read(
                self._real,
                self._recordings[prompt],
                hidden_layers=observes.hidden_layers,
                prompt_positions=observes.prefill_logits,
                tops=self._tops if observes.logits else 0,
            )
            self._readings[prompt] = kept = observes, reading
        return kept[1] if shown else kept[1].without_logits()

    def agreement(
        self, prompt: Prompt, plain: Sequence[int], other: Sequence[int]
    ) -> Agreement:
        """A difference is a fault of the replay or the strategy."""
        return "identical" if list(plain) == list(other) else "mismatch"

    def forget(self) -> None:
        """New strategy objects from here on."""
        self._strategies.clear()


def _serves(given: Observes, wanted: Observes) -> bool:
    return (
        set(wanted.hidden_layers) <= set(given.hidden_layers)
        and wanted.prefill_logits <= given.prefill_logits
        and wanted.logits <= given.logits
    )
