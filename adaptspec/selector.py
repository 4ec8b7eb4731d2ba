"""From what tunes decided to a choice: pure, and the reason is part of the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from adaptspec.errors import ProfileStoreError
from adaptspec.params import Scalar
from adaptspec.profile import (
    ANSWER,
    EVERY_CLASS,
    HOLDS,
    OURS,
    PLAIN,
    TOLD,
    ClassChoice,
    Environment,
    Measurement,
    Pick,
)

# One prompt has no spread: its ratio may be the machine's mood.
FEWEST_PROMPTS = 2

# What a stale gain must have been above for sure to be used still.
STALE_MARGIN = 1.1
# Speed is theirs: another minor version makes a profile stale.
DECISIVE = ("adaptspec", "torch", "transformers")

# What a caller may ask for when a model is loaded.
ASKED = {"dtype": "dtype", "device": "device"}


@dataclass(frozen=True)
class Expected:
    """What a setting was measured to bring on its class, on this machine.

    Args:
        ratio: How many times as fast as plain decoding, in the objective.
        low: Lower end of its 95% interval; None where it isn't known.
        high: Upper end.
        objective: As of :class:`~adaptspec.profile.Measurement`.
        tokens_per_second: Decoding speed, the prompt left out.
        prompts: How many were measured.
    """

    ratio: float
    low: float | None
    high: float | None
    objective: str
    tokens_per_second: float
    prompts: int

    @classmethod
    def of(cls, measured: Measurement) -> Expected:
        """What a profile's measurement promises."""
        return cls(
            measured.ratio,
            measured.interval_low,
            measured.interval_high,
            measured.objective,
            measured.tokens_per_second,
            measured.prompts,
        )


@dataclass(frozen=True)
class Choice:
    """What to decode with, and why.

    Args:
        prompt_class: The class whose choice it is, ``EVERY_CLASS`` (``"*"``) where that
            of all classes is used; what was asked for where there is no choice at all.
        strategy: Its name; ``autoregressive`` is plain decoding.
        params: The strategy's parameters; those left out have their defaults.
        reason: Why it is this one, in a line for people.
        lossless: False where sampled output follows another distribution than the
            target's.
        run: The tuning run that decided it; empty where none did.
        expected: What it was measured to bring; None: nothing was measured here.
    """

    prompt_class: str | None
    strategy: str
    params: Mapping[str, Scalar] = field(default_factory=dict)
    reason: str = ""
    lossless: bool = True
    run: str = ""
    expected: Expected | None = None


@dataclass(frozen=True)
class Ranking:
    """What a class's prompts may be decoded with here.

    Args:
        choices: The best first; the last is plain decoding.
        picks: What was tuned of each but the last.
        decided: Where they are from; None where nothing was decided.
        unsure: Whether no tune could tell that the picks are faster than plain
            decoding, which is used until requests tell.
        notes: What was left out of what was better than the best that is used, and
            what else is to be known.
    """

    choices: Sequence[Choice]
    picks: Sequence[Pick] = ()
    decided: ClassChoice | None = None
    unsure: bool = False
    notes: Sequence[str] = ()


def select(
    choices: Sequence[ClassChoice],
    environment: Environment,
    prompt_class: str | None = None,
    lossy: Collection[str] = (),
    *,
    run: str | None = None,
    refused: Callable[[Pick], str | None] = lambda pick: None,
) -> Choice:
    """The best of :func:`rank`, which has the same arguments."""
    ranking = rank(choices, environment, prompt_class, lossy, run=run, refused=refused)
    return ranking.choices[0]


def rank(
    choices: Sequence[ClassChoice],
    environment: Environment,
    prompt_class: str | None = None,
    lossy: Collection[str] = (),
    *,
    run: str | None = None,
    refused: Callable[[Pick], str | None] = lambda pick: None,
) -> Ranking:
    """What the best evidence on a class decided, as far as it can be used here.

    Choices of other engines are left out. Of a class that no tune decided on, and
    without a class, the choice over all classes is used. Of several tunes' choices
    :func:`best_evidence` takes one. A setting of it is left out that is lossy and not
    allowed, needs a draft model or heads that aren't here, is refused, or is stale
    (measured with another minor version of torch, transformers or AdaptSpec, or of
    another engine) with an interval not above 1.1. Reasons say what was left
    out of what was better than the best that is used, and what to pass for it.

    Args:
        choices: Of any environment; the order doesn't matter.
        lossy: Names of strategies that may be used though they are lossy.
        run: Only this tuning run's choices.
        refused: Why a setting can't be used here; None if it can.

    Raises:
        ProfileStoreError: if ``run`` is given and decided nothing.
    """
    # What another engine is fastest with says nothing of this one.
    choices = [c for c in choices if c.environment.engine == environment.engine]
    if run is not None:
        choices = [choice for choice in choices if choice.run == run]
        if not choices:
            raise ProfileStoreError(
                f"run {run!r} decided nothing for this model; `adaptspec profiles "
                "list` shows the runs"
            )
    if not choices:
        return _plain(prompt_class, "nothing is profiled for this model; run tune")
    here = decided_here(choices, environment)
    if not here:
        return _plain(prompt_class, _elsewhere(choices, environment))
    found, instead = _of_class(here, prompt_class)
    decided = best_evidence(found, environment)
    left: list[str] = []
    picks: list[Pick] = []
    stale = stale_versions(decided.environment, environment)
    for pick in decided.picks:
        if not pick.lossless and pick.strategy not in lossy:
            continue
        problem = _problem(pick, decided, environment, stale)
        if problem is None and (reason := refused(pick)):
            problem = f"is left out: {reason}"
        if problem is None:
            picks.append(pick)
        elif not picks:
            left.append(f"{pick.strategy} {problem}")
    notes = [*instead, *left, *_told(decided, environment, stale)]

    def choice(pick: Pick, *said: str) -> Choice:
        return Choice(
            decided.prompt_class,
            pick.strategy,
            dict(pick.params),
            "; ".join([*said, *notes]),
            pick.lossless,
            decided.run,
        )

    why = "" if picks else f": {decided.reason}"
    if left and not picks:
        why = ": nothing that was found faster can be used"
    plain = choice(Pick(PLAIN, {}, "", 1.0, 1.0, 1.0), f"plain decoding{why}")
    ranked = [choice(pick, pick.reason) for pick in picks]
    return Ranking([*ranked, plain], picks, decided, notes=notes)


def decided_here(
    choices: Sequence[ClassChoice], environment: Environment
) -> list[ClassChoice]:
    """Those that hold in ``environment``, draft model and heads aside: each setting
    says whether it needs them.

    ``tune`` packs the weights of a folder that it reads, while those of a model that
    an application has loaded are read as they lie. Where nothing was decided for the
    one, what was decided for the other serves; it is told.
    """
    here = [c for c in choices if not c.environment.differences(environment, HOLDS)]
    if here or not _ours(environment.kernel):
        return here
    others = [name for name in HOLDS if name != "kernel"]
    return [
        choice
        for choice in choices
        if not choice.environment.differences(environment, others)
        and _ours(choice.environment.kernel)
    ]


def _ours(kernel: str | None) -> bool:
    """Whether it is one of our products, whose cost of a row more is alike."""
    return kernel is not None and kernel.partition(" ")[0] in ("packed", "native")


def best_evidence(
    choices: Sequence[ClassChoice], environment: Environment
) -> ClassChoice:
    """The one of several choices for the same class that is used.

    A pinned run's counts before all others. Then what was measured with as many threads
    as here, with versions that aren't stale, with what is attached here, and by the
    time of the whole answer. Of those that rest on at least half as many prompts as the
    best of them the newest is used; but one that never tried what an older one chose
    must have found a higher ratio of the same objective.
    """
    kept = sorted(choices, key=lambda choice: (choice.created, choice.run))
    wishes: Sequence[Callable[[ClassChoice], bool]] = (
        lambda c: c.pinned,
        lambda c: not c.environment.differences(environment, TOLD),
        lambda c: not stale_versions(c.environment, environment),
        lambda c: c.environment.draft == environment.draft,
        lambda c: c.environment.heads == environment.heads,
        lambda c: c.objective == ANSWER,
    )
    for wish in wishes:
        kept = [choice for choice in kept if wish(choice)] or kept
    most = max(choice.prompts for choice in kept)
    kept = [choice for choice in kept if 2 * choice.prompts >= most]
    best = kept[0]
    for newer in kept[1:]:
        tried = not best.picks or best.picks[0].strategy in newer.tried
        comparable = newer.objective == best.objective
        if tried or (comparable and _gain(newer) > _gain(best)):
            best = newer
    return best


def stale_versions(then: Environment, now: Environment) -> str:
    """What minor versions changed since; empty where a profile is fresh.

    Another engine's speed is its own affair: then its version counts, and those of
    what it says it runs on.
    """
    decisive: Collection[str] = DECISIVE
    if then.engine != OURS:
        decisive = [
            name for name in then.versions if name not in ("adaptspec", "python")
        ]
    return ", ".join(
        f"{name} {then.versions[name]} then, {now.versions[name]} now"
        for name in decisive
        if name in then.versions
        and name in now.versions
        and _minor(then.versions[name]) != _minor(now.versions[name])
    )


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _gain(choice: ClassChoice) -> float:
    return choice.picks[0].ratio if choice.picks else 1.0


def _of_class(
    here: Sequence[ClassChoice], wanted: str | None
) -> tuple[list[ClassChoice], list[str]]:
    """The choices for a class, or what serves in their place and why."""
    found = [choice for choice in here if choice.prompt_class == wanted]
    if found and wanted != EVERY_CLASS:
        return found, []
    said = []
    classes = sorted({c.prompt_class for c in here} - {EVERY_CLASS})
    if wanted == EVERY_CLASS:
        pass  # what serves all classes, or stands for it
    elif wanted is not None:
        said = [f"class {wanted!r} isn't profiled; is: {', '.join(classes)}"]
    elif len(classes) > 1:
        said = ["no class was told"]
    # An older version decided nothing over all classes.
    for name in (EVERY_CLASS, "default"):
        if found := [choice for choice in here if choice.prompt_class == name]:
            return _broadest(found, here), said
    most = max(here, key=lambda c: (c.prompts, c.created, c.prompt_class)).prompt_class
    if len(classes) > 1:
        said.append(f"the choice for {most!r} is used, which rests on most prompts")
    return [choice for choice in here if choice.prompt_class == most], said


def _broadest(
    found: Sequence[ClassChoice], here: Sequence[ClassChoice]
) -> list[ClassChoice]:
    """Those over all classes of runs that have at least half as many as the run with
    most: a run of few classes says little of the others. What is pinned stays."""
    named = (choice.run for choice in here if choice.prompt_class != EVERY_CLASS)
    classes = Counter(named)
    most = max(classes[choice.run] for choice in found)
    return [c for c in found if c.pinned or 2 * classes[c.run] >= most]


def _problem(
    pick: Pick, decided: ClassChoice, environment: Environment, stale: str
) -> str | None:
    """Why a setting can't be used here, as it follows its name; None if it can."""
    if missing := _missing(pick, decided.environment, environment):
        return f"was {pick.ratio:.2f}x with {missing}, which isn't here"
    if stale and pick.low <= STALE_MARGIN:
        return (
            f"was measured with other versions ({stale}), and its gain wasn't above "
            f"{STALE_MARGIN} for sure: run tune again"
        )
    return None


def _missing(pick: Pick, then: Environment, now: Environment) -> str:
    """What a setting needs that isn't here, and how to pass it; empty if nothing."""
    missing = []
    if pick.needs_draft and then.draft != now.draft:
        missing.append(
            f"the draft model {then.draft_name} (draft_model=, --draft-model)"
        )
    if pick.needs_heads and then.heads != now.heads:
        missing.append(f"the heads {then.heads_name} (heads=, --heads)")
    return " and ".join(missing)


def _told(decided: ClassChoice, now: Environment, stale: str) -> list[str]:
    """What else is to be known of a choice."""
    then = decided.environment
    said = []
    if now.heads is not None and then.heads != now.heads:
        said.append(f"measured without {now.heads_name}: run tune with them")
    said += [
        f"measured with {name} {getattr(then, name)} (here {getattr(now, name)})"
        for name in then.differences(now, (*TOLD, "kernel"))
    ]
    if stale:
        said.append(f"the profile is stale ({stale}): run tune again")
    elif changed := _changed(then, now):
        said.append(f"measured with other versions: {changed}")
    return said


def _plain(prompt_class: str | None, reason: str) -> Ranking:
    return Ranking([Choice(prompt_class, PLAIN, {}, f"plain decoding: {reason}")])


def _elsewhere(choices: Sequence[ClassChoice], environment: Environment) -> str:
    names, then = _nearest(choices, environment)
    told = ", ".join(
        f"{name} {getattr(then, name)} (here {getattr(environment, name)})"
        for name in names
        # Weights of another type have another digest.
        if name != "model" or "dtype" not in names
    )
    ways = [f"{ASKED[n]}={getattr(then, n)!r}" for n in names if n in ASKED]
    way = "run tune here"
    if ways and set(names) <= {*ASKED, "model", "kernel", "device_name"}:
        way = f"load with {', '.join(ways)}, or {way}"
    return f"profiled elsewhere, with {told}; {way}"


def _nearest(
    choices: Sequence[ClassChoice], environment: Environment
) -> tuple[list[str], Environment]:
    """The environment that differs in the fewest things, and in which."""
    ranked = sorted(
        choices,
        key=lambda c: (len(c.environment.differences(environment, HOLDS)), c.run),
    )
    then = ranked[0].environment
    return then.differences(environment, HOLDS), then


def _changed(then: Environment, now: Environment) -> str:
    return ", ".join(
        f"{name} {then.versions.get(name)} then, {version} now"
        for name, version in sorted(now.versions.items())
        if name != "python" and then.versions.get(name, version) != version
    )
