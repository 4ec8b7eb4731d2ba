"""What forwards cost on this machine: measured once, kept beside the profiles.

The tuner predicts with it, the report plots it, and strategies that size their trees by
the hardware start with it instead of measuring again.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    from adaptspec.model.forward_times import LatencyCurve, LatencyTimer
    from adaptspec.model.language_model import LanguageModel
    from adaptspec.profile import Environment, ProfileStore

COSTS_RECORD = "costs"  # the name of the record in the store
RECORD_FORMAT = 2


@dataclass(frozen=True)
class ForwardCosts:
    """Seconds of one forward by its tokens and the cached tokens they attend to.

    Args:
        contexts: Measured numbers of cached tokens, ascending.
        rows: Measured numbers of tokens, ascending.
        seconds: ``[contexts][rows]``.
        moving: Seconds of keeping a path of a tree whose rows must be moved for it.
    """

    contexts: Sequence[int]
    rows: Sequence[int]
    seconds: Sequence[Sequence[float]]
    moving: float = 0.0

    def __post_init__(self) -> None:
        lines = [len(line) == len(self.rows) for line in self.seconds]
        if not self.rows or len(lines) != len(self.contexts) or not all(lines):
            raise AdaptSpecError(
                "forward costs must be [contexts][rows], got "
                f"{len(self.contexts)} contexts, {len(self.rows)} rows and "
                f"{len(lines)} lines"
            )
        if (
            any(not 0 < value < math.inf for line in self.seconds for value in line)
            or any(
                list(axis) != sorted(set(axis)) for axis in (self.contexts, self.rows)
            )
            or not 0 <= self.moving < math.inf
        ):
            raise AdaptSpecError(
                "forward costs must be positive seconds over ascending axes"
            )

    def curve(self, context: int) -> LatencyCurve:
        """Seconds by tokens behind ``context`` cached ones.

        Interpolated; beyond the measured contexts the last slope goes on.
        """
        from adaptspec.model.forward_times import LatencyCurve

        if len(self.contexts) == 1:
            return LatencyCurve(self.rows, self.seconds[0], self.contexts[0])
        at = bisect_left(self.contexts, context)
        high = min(max(at, 1), len(self.contexts) - 1)
        low = high - 1
        width = self.contexts[high] - self.contexts[low]
        share = max(0.0, (context - self.contexts[low]) / width)
        found: list[float] = []
        for near, far in zip(self.seconds[low], self.seconds[high], strict=True):
            # More cached tokens never cost less: a fall is noise.
            value = near + share * max(0.0, far - near)
            found.append(max(value, found[-1]) if found else value)
        return LatencyCurve(self.rows, found, context)

    def as_json(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {
            "contexts": list(self.contexts),
            "rows": list(self.rows),
            "seconds": [list(line) for line in self.seconds],
            "moving": self.moving,
        }


@dataclass(frozen=True)
class HardwareCosts:
    """The forwards of a target and its draft model, in one environment.

    Args:
        measured: When, ISO 8601, UTC.
        seconds: What measuring took.
    """

    target: ForwardCosts
    draft: ForwardCosts | None
    measured: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {
            "format": RECORD_FORMAT,
            "target": self.target.as_json(),
            "draft": None if self.draft is None else self.draft.as_json(),
            "measured": self.measured,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> HardwareCosts:
        """The costs a record holds.

        Raises:
            AdaptSpecError: if it isn't such a record.
        """
        try:
            if record["format"] != RECORD_FORMAT:
                raise AdaptSpecError(f"format {RECORD_FORMAT} expected")
            draft = record["draft"]
            return cls(
                ForwardCosts(**record["target"]),
                None if draft is None else ForwardCosts(**draft),
                str(record["measured"]),
                float(record["seconds"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise AdaptSpecError(f"not a record of hardware costs: {error!r}") from None


def measure_costs(
    model: LanguageModel,
    draft: LanguageModel | None = None,
    *,
    contexts: Sequence[int] = (128, 1024, 4096),
    draft_rows: Sequence[int] = (1, 2, 3, 4, 6, 8, 16),
    rounds: int = 24,
    longest: float = 30.0,
    text: Sequence[int] = (),
    doing: Callable[[str], None] = lambda text: None,
) -> HardwareCosts:
    """Measure both models' forwards in under a minute.

    Args:
        contexts: Cached tokens behind which forwards are timed.
        draft_rows: Tokens of the draft model's forwards.
        rounds: How often each is timed, at most.
        longest: Seconds after which nothing is timed once more.
        text: The target's token ids of what will be decoded, see :class:`LatencyTimer`.

    Raises:
        AdaptSpecError: if the target can't verify drafts; nothing is to be chosen then.
    """
    from adaptspec.model.forward_times import TIMED_ROWS, time_rounds

    if model.capability.level == "plain":
        raise AdaptSpecError(f"can't verify drafts: {model.capability.reason}")
    started = perf_counter()
    doing(f"measuring forwards of {model.name}")
    # In turns: a machine that is slow for some seconds is slow for all of it, and what
    # a draft costs in comparison stays right.
    timers = [_timers(model, TIMED_ROWS, contexts, text)]
    if draft is not None and draft.capability.level != "plain":
        timers.append(_timers(draft, draft_rows, contexts))
    time_rounds([timer for group in timers for timer in group], rounds, longest)
    target, *small = (
        _costs(found, group)
        for found, group in zip((model, draft), timers, strict=False)
        if found is not None
    )
    return HardwareCosts(
        target,
        small[0] if small else None,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        perf_counter() - started,
    )


def explained(
    costs: ForwardCosts,
    seen: Sequence[tuple[int, float]],
    factor: float = 1.3,
) -> bool:
    """Whether ``costs`` explain what forwards of one token took, within a factor.

    Args:
        seen: Cached tokens and seconds of a forward, each typical of one generation.
    """
    if not seen:
        return True
    off = median(seconds / costs.curve(cached)(1) for cached, seconds in seen)
    return 1 / factor <= off <= factor


def stored_costs(store: ProfileStore, environment: Environment) -> HardwareCosts | None:
    """Costs measured in ``environment``, None if there are none that are fresh."""
    record = store.record(costs_owner(environment), COSTS_RECORD)
    if record is None:
        return None
    try:
        return HardwareCosts.from_json(record)
    except AdaptSpecError:  # another version's, or damaged: measured again
        return None


def store_costs(
    store: ProfileStore, environment: Environment, costs: HardwareCosts
) -> None:
    """Keep them for every later run and application in ``environment``."""
    store.put_record(costs_owner(environment), COSTS_RECORD, costs.as_json())


def use_costs(
    costs: HardwareCosts, model: LanguageModel, draft: LanguageModel | None
) -> None:
    """Let strategies size their drafts by these instead of measuring again."""
    from adaptspec.model.forward_times import USUAL_CONTEXT

    model.__dict__["latency"] = costs.target.curve(USUAL_CONTEXT)
    if draft is not None and costs.draft is not None:
        draft.__dict__["latency"] = costs.draft.curve(USUAL_CONTEXT)


def costs_owner(environment: Environment) -> str:
    """Under which name costs are kept: equal where they hold, so everything of the
    key, heads aside, and minor versions."""
    versions = {
        name: ".".join(environment.versions.get(name, "").split(".")[:2])
        for name in ("adaptspec", "torch", "transformers")
    }
    text = json.dumps([list(environment.place()), versions], sort_keys=True)
    return "hardware-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _timers(
    model: LanguageModel,
    rows: Sequence[int],
    contexts: Sequence[int],
    text: Sequence[int] = (),
) -> list[LatencyTimer]:
    """One for each context that the model has room for."""
    from adaptspec.model.forward_times import LatencyTimer

    timers: dict[int, LatencyTimer] = {}
    for context in contexts:
        timer = LatencyTimer(model, rows, context, text)
        timers.setdefault(timer.context, timer)
    return [timers[context] for context in sorted(timers)]


def _costs(model: LanguageModel, timers: Sequence[LatencyTimer]) -> ForwardCosts:
    from adaptspec.model.forward_times import measure_moving, rising

    curves = [timer.curve() for timer in timers]
    # Models of few positions may have room for fewer tokens behind a long context.
    kept = sorted(set.intersection(*(set(curve.rows) for curve in curves)))
    # Nor do more cached tokens cost less.
    columns = [rising([curve(count) for curve in curves]) for count in kept]
    return ForwardCosts(
        [curve.context for curve in curves],
        kept,
        [list(line) for line in zip(*columns, strict=True)],
        measure_moving(model, curves[0].context),
    )
