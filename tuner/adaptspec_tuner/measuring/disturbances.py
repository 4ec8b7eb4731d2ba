"""Finds steps that the machine held up, and puts typical times in their place.

A step is known by its parts: the target's forward, which takes about the same for all
trees of a size, whatever the strategy, and drafting. Two things give a held-up one
away. The process took no processor time while it stood still (it was stopped, or the
machine was). Or a part took far longer than is typical of its kind, compared with the
steps around it; where all steps around it are slow, the machine is loaded, which falls
on all alike that take turns, and none of them is a stray.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING

from adaptspec.model.forward_times import rising
from adaptspec_tuner.measuring.in_turns import Piece

if TYPE_CHECKING:
    from adaptspec.decoding.engine import Generation


@dataclass(frozen=True)
class Limits:
    """What counts as held up.

    Args:
        times: How much longer than typical, at least.
        deviations: The same in robust standard deviations of the logarithm.
        still: Seconds without processor time, at least.
        still_share: The same, of what the piece took beside them.
        forwards: Drafting of fewer plain forwards' time is never a stray, whatever is
            typical of the setting: it may ask a draft model rarely.
        window: Steps before and behind that tell how fast the machine is there.
        fewest: Steps of a run below which nothing is typical.
    """

    times: float = 3.0
    deviations: float = 6.0
    still: float = 0.05
    still_share: float = 0.5
    forwards: float = 10.0
    window: int = 15
    fewest: int = 12


@dataclass(frozen=True)
class TimedRun:
    """One generation with the times of its pieces.

    Args:
        name: Of the setting; the same in all prompts.
        prompt: The prompt's id.
        pieces: The prefill's, then each step's; of one that isn't decoded in steps
            (another engine's), one.
        in_steps: Whether the pieces are the prefill and the steps of ``generation``.
    """

    name: str
    prompt: str
    generation: Generation
    pieces: Sequence[Piece]
    in_steps: bool = True


@dataclass(frozen=True)
class Undisturbed:
    """What generations would have taken if nothing had held them up.

    Args:
        generations: In the order given, with typical times in place of strays.
        held_up: Of each generation, how many pieces were.
        lost: Of each generation, the seconds taken away.
        forwards: Kind of tree size (:func:`kind_of`) -> typical seconds of the
            target's forward, never falling.
    """

    generations: Sequence[Generation]
    held_up: Sequence[int]
    lost: Sequence[float]
    forwards: Mapping[int, float] = field(default_factory=dict)

    def forward(self, rows: int) -> float | None:
        """Typical seconds of a forward of ``rows``; None where that isn't known."""
        return self.forwards.get(kind_of(rows))


@dataclass
class _Part:
    """A prefill, a step, or another engine's whole generation.

    Args:
        run: Index of its run.
        place: Index of the step; None for a prefill.
        seconds: Of the target's forward (or all), of drafting, of the rest.
    """

    run: int
    place: int | None
    name: str
    piece: Piece
    rows: int
    seconds: list[float]
    held_up: bool = False

    @property
    def group(self) -> tuple[str, bool]:
        """The parts it is compared with when it stood still."""
        return self.name, self.place is None


def undisturbed(runs: Sequence[TimedRun], limits: Limits | None = None) -> Undisturbed:
    """Take away from ``runs`` what the machine held up.

    A step that was has the time that is typical of it instead, so that all settings are
    compared over the same answer.

    Args:
        runs: Of one class: all settings, prompts and repeats.
    """
    limits = limits or Limits()
    parts = [part for at, run in enumerate(runs) for part in _parts(at, run)]
    _without_standstill(parts, limits)
    steps = [p for p in parts if p.place is not None and runs[p.run].in_steps]
    levels = _without_slow_steps(steps, limits)
    prompts = [run.prompt for run in runs]
    _without_slow_prefills([p for p in parts if p.place is None], prompts, limits)
    of_run: dict[int, list[_Part]] = defaultdict(list)
    for part in parts:
        of_run[part.run].append(part)
    generations = [_cleared(run, of_run[at]) for at, run in enumerate(runs)]
    return Undisturbed(
        generations,
        [sum(part.held_up for part in of_run[at]) for at in range(len(runs))],
        [
            _seconds(run.generation) - _seconds(cleared)
            for run, cleared in zip(runs, generations, strict=True)
        ],
        levels,
    )


def _parts(at: int, run: TimedRun) -> list[_Part]:
    stats = run.generation.stats
    if not run.in_steps:
        return [
            _Part(at, 0, run.name, piece, 1, [step.seconds_target, 0.0, 0.0])
            for piece, step in zip(run.pieces, stats.steps, strict=False)
        ]
    found = [
        _Part(at, None, run.name, piece, 0, [stats.seconds_prefill, 0.0, 0.0])
        for piece in run.pieces[:1]
    ]
    for place, (piece, step) in enumerate(
        zip(run.pieces[1:], stats.steps, strict=False)
    ):
        seconds = [step.seconds_target, step.seconds_draft, step.seconds_rest]
        found.append(_Part(at, place, run.name, piece, step.rows, seconds))
    return found


def _without_standstill(parts: Sequence[_Part], limits: Limits) -> None:
    """Take away the time in which the process did nothing, where that isn't usual.

    It is usual where others work on the same processors, for all parts at that time,
    and on a GPU, whose forwards may be waited for without processor time.
    """
    parts = sorted((p for p in parts if p.piece.seconds > 0), key=_when)
    shares = [_idle(part.piece) / part.piece.seconds for part in parts]
    around = _running_median(shares, limits.window)
    groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for at, part in enumerate(parts):
        groups[part.group].append(at)
    # Disturbances only ever lengthen, and of few parts half may have met one.
    usual = {
        key: _quantile((shares[at] for at in found), 0.25)
        for key, found in groups.items()
    }
    # How many threads work at a time.
    threads = {
        key: _quantile((_threads(parts[at].piece) for at in found), 0.75)
        for key, found in groups.items()
    }
    for part, share, here in zip(parts, shares, around, strict=True):
        seconds = part.piece.seconds
        excess = (share - max(here, usual[part.group])) * seconds
        if excess > max(limits.still, limits.still_share * (seconds - excess)):
            part.held_up = True
            beside = part.piece.processor / max(1.0, threads[part.group])
            longest = max(range(3), key=part.seconds.__getitem__)
            kept = part.seconds[longest] - max(excess, seconds - beside)
            part.seconds[longest] = max(0.0, kept)


def _without_slow_steps(steps: Sequence[_Part], limits: Limits) -> dict[int, float]:
    """Replace forwards and drafting that took far longer than is typical.

    Returns:
        Kind of tree size -> typical seconds of a forward, never falling.
    """
    steps = sorted((step for step in steps if step.seconds[0] > 0), key=_when)
    if len(steps) < limits.fewest:
        return {}
    logs = [math.log(step.seconds[0]) for step in steps]
    kinds: dict[int, list[int]] = defaultdict(list)
    for at, step in enumerate(steps):
        kinds[kind_of(step.rows)].append(at)
    # Sizes and the machine's speed by turns, as in Tukey's median polish.
    speed = [0.0] * len(steps)
    for _ in range(3):
        levels = {
            kind: median(logs[at] - speed[at] for at in found)
            for kind, found in kinds.items()
        }
        over = [
            log - levels[kind_of(s.rows)] for log, s in zip(logs, steps, strict=True)
        ]
        speed = _running_median(over, limits.window)
    middle = median(speed)
    rest = [value - here for value, here in zip(over, speed, strict=True)]
    deviation = 1.4826 * median(abs(value) for value in rest)
    limit = max(math.log(limits.times), limits.deviations * deviation)
    drafting: dict[tuple[str, int], list[float]] = defaultdict(list)
    for step in steps:
        for phase in (1, 2):
            drafting[step.name, phase].append(step.seconds[phase])
    usual = {key: median(found) for key, found in drafting.items()}
    most = {
        key: limits.times * _quantile(found, 0.95) for key, found in drafting.items()
    }
    smallest = levels[min(levels)]
    for step, beyond, here in zip(steps, rest, speed, strict=True):
        if beyond > limit:
            step.held_up = True
            step.seconds[0] = math.exp(levels[kind_of(step.rows)] + here)
        for phase in (1, 2):
            key = step.name, phase
            bound = max(most[key], limits.forwards * math.exp(smallest + here))
            if step.seconds[phase] > bound:
                step.held_up = True
                step.seconds[phase] = usual[key]
    found = sorted(levels)
    typical = rising([math.exp(levels[kind] + middle) for kind in found])
    return dict(zip(found, typical, strict=True))


def _without_slow_prefills(
    prefills: Sequence[_Part], prompts: Sequence[str], limits: Limits
) -> None:
    """Replace prefills that took far longer than their prompt and setting explain."""
    prefills = [part for part in prefills if part.seconds[0] > 0]
    if len(prefills) < 3:
        return
    logs = [math.log(part.seconds[0]) for part in prefills]
    of_prompt = [prompts[part.run] for part in prefills]
    settings = dict.fromkeys((part.name for part in prefills), 0.0)
    for _ in range(3):
        left: dict[str, list[float]] = defaultdict(list)
        for log, part, prompt in zip(logs, prefills, of_prompt, strict=True):
            left[prompt].append(log - settings[part.name])
        read = {prompt: median(found) for prompt, found in left.items()}
        over: dict[str, list[float]] = defaultdict(list)
        for log, part, prompt in zip(logs, prefills, of_prompt, strict=True):
            over[part.name].append(log - read[prompt])
        settings = {name: _quantile(found, 0.25) for name, found in over.items()}
    for log, part, prompt in zip(logs, prefills, of_prompt, strict=True):
        expected = read[prompt] + settings[part.name]
        if log - expected > math.log(limits.times):
            part.held_up = True
            part.seconds[0] = math.exp(expected)


def _cleared(run: TimedRun, parts: Sequence[_Part]) -> Generation:
    """The generation with the seconds that its parts are left with."""
    stats = run.generation.stats
    steps, prefill = list(stats.steps), stats.seconds_prefill
    for part in parts:
        if not part.held_up:
            continue
        if part.place is None:
            prefill = part.seconds[0]
        else:
            target, draft, rest = part.seconds
            steps[part.place] = steps[part.place]._replace(
                seconds_target=target, seconds_draft=draft, seconds_rest=rest
            )
    cleared = replace(stats, seconds_prefill=prefill, steps=steps)
    return replace(run.generation, stats=cleared)


def kind_of(rows: int) -> int:
    """Trees of 1, 2, 3 to 4, 5 to 8... rows are of one kind each."""
    return (rows - 1).bit_length()


def _when(part: _Part) -> int:
    return part.piece.when


def _idle(piece: Piece) -> float:
    return max(0.0, piece.seconds - piece.processor)


def _threads(piece: Piece) -> float:
    return piece.processor / piece.seconds


def _seconds(generation: Generation) -> float:
    return generation.stats.seconds_prefill + generation.stats.seconds_decode


def _quantile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` of all are below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _running_median(values: Sequence[float], window: int) -> list[float]:
    """Of each value and ``window`` before and behind it; of as many at the ends."""
    size = 2 * window + 1
    found = []
    for at in range(len(values)):
        begin = min(max(0, at - window), max(0, len(values) - size))
        found.append(median(values[begin : begin + size]))
    return found
