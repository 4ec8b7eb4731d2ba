"""Simulates tunes whose truth is known, and counts how often they decide rightly.

    python benchmarks/deciding.py [--tunes 1000] [--world NAME]

Prompts are spread by 0.15 and runs by 0.05 in logarithms, three runs each; three
settings in every class. "apart" draws a prompt's effect for each setting anew, "alike"
gives settings most of it in common. The first table has what is asked of the numbers:
how often intervals cover, how often a false setting is chosen, how often a real gain is
found, how far the reported ratio of the chosen is off on average. The second has worlds
that the rule wasn't made for: heavier tails, spreads that differ by class, mixed gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import click
import numpy as np
from numpy.typing import NDArray

from adaptspec_tuner.deciding.decide import Decided, decide
from adaptspec_tuner.deciding.evidence import Ratios
from adaptspec_tuner.deciding.rule import Candidate, Rule

GAIN = math.log(1.15)
RUNS = 3


@dataclass(frozen=True)
class World:
    """Tunes of one kind.

    Args:
        name: For the table.
        prompts: Of each class.
        gains: ``[classes, settings]``, logarithms of the true ratios.
        common: Part of a prompt's variance that all settings have in common.
        spread: Of prompts, for each class or for all.
        noise: Of runs.
        tails: Degrees of freedom of the prompts' t distribution; None: normal.
    """

    name: str
    prompts: Sequence[int]
    gains: NDArray[np.float64]
    common: float = 0.0
    spread: float | Sequence[float] = 0.15
    noise: float = 0.05
    tails: float | None = None

    @property
    def title(self) -> str:
        """Its name, and what settings have in common."""
        return f"{self.name}, {'alike' if self.common else 'apart'}"


@dataclass
class Tally:
    """What came of the tunes of a world."""

    tunes: int = 0
    covered: list[float] = field(default_factory=list)
    false: int = 0  # tunes in which a setting without a gain was chosen
    slower: int = 0  # classes in which one that is slower than plain decoding was
    right: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    errors: list[float] = field(default_factory=list)


def settings(count: int) -> list[str]:
    """Keys of as many settings."""
    return [f"s{number}" for number in range(count)]


def tune(world: World, random: np.random.Generator) -> Ratios:
    """Ratios of one tune, as :func:`decide` takes them."""

    def drawn(count: int) -> NDArray[np.float64]:
        if world.tails is None:
            return random.standard_normal(count)
        scale = math.sqrt(world.tails / (world.tails - 2))
        return np.asarray(random.standard_t(world.tails, count) / scale)

    spreads = np.broadcast_to(world.spread, len(world.prompts))
    ratios: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number, count in enumerate(world.prompts):
        shared = drawn(count)
        of_class = ratios.setdefault(f"c{number}", {})
        gains = world.gains[number]
        for key, gain in zip(settings(len(gains)), gains, strict=True):
            own = drawn(count)
            effect = math.sqrt(world.common) * shared
            effect += math.sqrt(1 - world.common) * own
            runs = world.noise * random.standard_normal((count, RUNS))
            logs = gain + spreads[number] * effect[:, None] + runs
            of_class[key] = {f"p{p}": np.exp(logs[p]).tolist() for p in range(count)}
    return ratios


def simulate(world: World, tunes: int, rule: Rule, seed: int = 0) -> Tally:
    """Decide on so many tunes of a world."""
    random = np.random.default_rng(seed)
    keys = settings(world.gains.shape[1])
    candidates = {key: Candidate(key) for key in keys}
    tally = Tally(right=np.zeros(len(world.prompts)))
    for number in range(tunes):
        decided = decide(tune(world, random), candidates, rule=rule, seed=number)
        _count(tally, world, decided, keys)
    return tally


def _count(
    tally: Tally, world: World, decided: Mapping[str, Decided], keys: Sequence[str]
) -> None:
    tally.tunes += 1
    false = False
    for number in range(len(world.prompts)):
        of = decided[f"c{number}"]
        truth = dict(zip(keys, world.gains[number], strict=True))
        for key, found in of.found.items():
            assert found.low is not None
            assert found.high is not None
            tally.covered.append(found.low <= math.exp(truth[key]) <= found.high)
        if of.chosen is None:
            continue
        gain = truth[of.chosen]
        false |= gain <= 0
        tally.slower += gain < 0
        tally.right[number] += gain > 0 and gain == max(truth.values())
        tally.errors.append(math.log(of.found[of.chosen].ratio) - gain)
    tally.false += false


def one(
    classes: int, faster: Sequence[int], others: float = 0.0
) -> NDArray[np.float64]:
    """Three settings, the first of them faster in these classes."""
    gains = np.zeros((classes, 3))
    gains[:, 0] = others
    gains[list(faster), 0] = GAIN
    return gains


def asked(common: float) -> list[World]:
    """The worlds that something is asked of."""
    return [
        *(
            World(f"nothing faster, 8 classes of {n}", [n] * 8, one(8, []), common)
            for n in (2, 4, 8, 20)
        ),
        World("1.15x on all 8 classes of 4", [4] * 8, one(8, range(8)), common),
        World(
            "1.15x on a class of 20 alone, 7 of 4",
            *([20] + [4] * 7, one(8, [0]), common),
        ),
        World("1.15x, one class of 20", [20], one(1, [0]), common),
    ]


def further(common: float) -> list[World]:
    """Worlds that the rule wasn't made for."""
    uneven = (0.05, 0.05, 0.1, 0.1, 0.15, 0.2, 0.3, 0.4)
    return [
        World("1.15x on one of 8 classes of 20", [20] * 8, one(8, [0]), common),
        World("1.15x on 4 of 8 classes of 8", [8] * 8, one(8, range(4)), common),
        World(
            "1.15x on 7 of 8 classes of 4, 0.9x on one",
            *([4] * 8, one(8, range(7), math.log(0.9)), common),
        ),
        World(
            "tails of t with 3: nothing faster, 8 of 4",
            *([4] * 8, one(8, []), common),
            tails=3.0,
        ),
        World(
            "tails of t with 3: 1.15x on all 8 of 4",
            *([4] * 8, one(8, range(8)), common),
            tails=3.0,
        ),
        World(
            "spreads 0.05 to 0.4: nothing faster, 8 of 4",
            *([4] * 8, one(8, []), common, uneven),
        ),
        World(
            "spreads 0.05 to 0.4: 1.15x on all 8 of 4",
            *([4] * 8, one(8, range(8)), common, uneven),
        ),
        World("nothing faster, one class of 4", [4], one(1, []), common),
        World("2x, one class of 4", [4], one(1, [0]) * 5, common),
    ]


def row(world: World, tally: Tally) -> str:
    """Of the table."""
    gained = np.flatnonzero((world.gains > 0).any(axis=1))
    found = off = "-"
    if len(gained):
        found = f"{tally.right[gained].mean() / tally.tunes:.1%}"
        off = f"{math.expm1(np.mean(tally.errors)):+.1%}" if tally.errors else "-"
    return (
        f"| {world.title} | {np.mean(tally.covered):.1%} | "
        f"{tally.false / tally.tunes:.1%} | "
        f"{tally.slower / tally.tunes / len(world.prompts):.1%} | {found} | {off} |"
    )


@click.command(help=__doc__)
@click.option("--tunes", default=1000, show_default=True, help="Of each world.")
@click.option("--world", "wanted", help="Only those whose name contains this.")
@click.option("--draws", default=1000, show_default=True, help="As of Rule.")
@click.option("--seed", default=0, show_default=True)
def main(tunes: int, wanted: str | None, draws: int, seed: int) -> None:
    """Print the tables."""
    rule = Rule(draws=draws, gain=None)
    for worlds in (asked, further):
        click.echo(
            "| world | intervals cover | a false setting in a tune | a slower one in "
            "a class | the gain is found | the chosen's ratio is off by |"
        )
        click.echo("| --- | --- | --- | --- | --- | --- |")
        for world in [*worlds(0.0), *worlds(0.7)]:
            if wanted is None or wanted in world.title:
                click.echo(row(world, simulate(world, tunes, rule, seed)))
        click.echo()


if __name__ == "__main__":
    main()
