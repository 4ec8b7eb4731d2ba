"""Simulates what the guard loses where drafting doesn't pay, and costs where it does.

    python benchmarks/guard.py

A fake clock and fake drafters: a plain step takes 1, a step with candidates what the
machine's rows cost, and drafters draft and accept what they are told. Each cell is the
total time, the prompt's included, over that of plain decoding, of the first sequence
that a strategy decodes and of the tenth. Where drafting pays, the guarded time is
compared with drafting in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from statistics import median

import click
import torch
from rich.console import Console
from rich.table import Table

from adaptspec.decoding.guard import Guard, GuardMemory, PlainTimes
from adaptspec.strategy import Context, Drafter, Outcome, reading_from
from adaptspec.token_tree import TokenTree

NOTHING = torch.empty(0, 0)
# At the n-th token of a text: candidates accepted by a step that begins there.
Accepted = Callable[[int], int]


@dataclass
class Machine:
    """A clock that steps and drafts move on.

    Args:
        row: What each candidate adds to a step.
        token: What reading a token of a prompt takes.
        noise: Standard deviation of a step's time, of its logarithm.
        pauses: Share of steps that take ``pause`` more.
    """

    row: float = 0.02
    token: float = 0.06
    noise: float = 0.0
    pauses: float = 0.0
    pause: float = 20.0
    seed: int = 0
    now: float = 0.0
    lost: float = 0.0  # to noise and pauses
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def __call__(self) -> float:
        """Time."""
        return self.now

    def work(self, time: float) -> None:
        """Do what takes ``time`` without noise."""
        real = time
        if self.noise:
            real *= math.exp(self.random.gauss(0, self.noise) - self.noise**2 / 2)
        if self.pauses and time >= 1 and self.random.random() < self.pauses:
            real += self.pause
        self.now += real
        self.lost += real - time


def never(at: int) -> int:
    """No candidate is right."""
    return 0


@dataclass(frozen=True)
class Scripted:
    """How a drafter drafts.

    Args:
        nodes: Candidates of its trees; 0: it finds none.
        accepted: How many are right, by the token at which a step begins.
        drafting: What a proposal takes.
        each: What it takes more for each candidate.
        reading: What a token that its draft model hasn't read takes more.
        positions: Prompt positions whose logits it wants.
        row: What one of them takes, as a share of reading a token.
        every: It finds candidates at one step in so many.
    """

    nodes: int = 16
    accepted: Accepted = never
    drafting: float = 0.0
    each: float = 0.0
    reading: float = 0.0
    positions: int = 1
    row: float = 0.2
    every: int = 1


class ScriptedDrafter(Drafter):
    """Drafts a star of candidates, or a chain if some are right."""

    def __init__(self, script: Scripted, machine: Machine) -> None:
        self._script, self._machine = script, machine
        self.asked = self._first = self._read = 0

    def propose(self, context: Context) -> TokenTree:
        """As many candidates as the script says and may be verified."""
        script = self._script
        if script.reading:
            self._machine.work(script.reading * self._unread(context))
        self.asked += 1
        nodes = min(script.nodes, context.max_nodes, context.room - 1)
        if context.step % script.every:
            nodes = 0
        drafting = script.drafting + script.each * nodes
        if drafting:
            self._machine.work(drafting)
        return TokenTree.chain(context.ids[-1], [0] * nodes)

    def observe(self, outcome: Outcome) -> None:
        """What it drafted itself it needn't read."""
        if outcome.tree is not None and len(outcome.tree) > 1:
            self._read += len(outcome.emitted) - 1

    def _unread(self, context: Context) -> int:
        """Tokens to read with a draft model, which may begin near the prompt's end."""
        tokens = len(context.ids)
        first = reading_from(self._first, self._read, tokens, context.readable)
        unread = tokens - (self._read if first == self._first else first)
        self._first, self._read = first, tokens
        return unread


@dataclass(frozen=True)
class Decoded:
    """One sequence.

    Args:
        exact: Its time without noise.
        asked: Steps in which the drafter was asked.
        trace: Token at which a step began, and whether it asked.
    """

    exact: float
    asked: int
    trace: Sequence[tuple[int, bool]]


def decode(
    machine: Machine,
    script: Scripted,
    length: int,
    prompt: int = 64,
    memory: GuardMemory | None = None,
    at: int = 0,
) -> Decoded:
    """A sequence of ``length`` tokens, guarded if there is a ``memory``.

    ``at`` is where in the script's text it begins.
    """
    drafter: Drafter = ScriptedDrafter(script, machine)
    rows, guard = script.positions, None
    began, lost = machine.now, machine.lost
    if memory is not None:
        drafter = guard = Guard(
            drafter,
            memory,
            machine,
            prompt,
            length,
            reads=script.reading > 0,
            row=script.row,
        )
        rows = guard.prompt_rows(rows)
    shown = (min(rows, prompt) - 1) * script.row
    machine.work(machine.token * (prompt + shown))
    drafter.observe(Outcome(None, (), [0], {}, NOTHING))
    emitted, step, passed, trace = 1, 0, 0, []
    while emitted < length:
        ids = range(prompt + emitted)
        tree = drafter.propose(Context(ids, length - emitted, 128, step))
        asked = guard is None or guard.passed_over == passed
        passed = 0 if guard is None else guard.passed_over
        nodes = len(tree) - 1
        machine.work(1 + machine.row * nodes)
        right = min(script.accepted(at + emitted), nodes, length - emitted - 1)
        drafter.observe(Outcome(tree, (), [0] * (1 + right), {}, NOTHING))
        trace.append((emitted, asked))
        emitted, step = emitted + 1 + right, step + 1
    drafter.close()
    exact = machine.now - began - (machine.lost - lost)
    return Decoded(exact, sum(1 for _, asked in trace if asked), trace)


PLAIN = Scripted(nodes=0)
# Label -> script, and the time of a candidate.
LOSING = {
    "tree of 16, rows cheap": (Scripted(), 0.02),
    "tree of 64, rows cheap": (Scripted(64), 0.02),
    "tree of 16, rows dear": (Scripted(), 0.1),
    "tree of 64, rows dear": (Scripted(64), 0.1),
    "tree of 16, reads prompt rows": (Scripted(positions=256), 0.05),
    "draft model, 0.4 a step": (Scripted(4, drafting=0.4, reading=0.02), 0.02),
    "draft model, 0.4 a token": (Scripted(4, each=0.4, reading=0.02), 0.02),
    "finds nothing, 0.2% of a step": (Scripted(0, drafting=0.002), 0.02),
    "finds nothing, 5% of a step": (Scripted(0, drafting=0.05), 0.02),
    "finds little, one step in 8": (Scripted(8, every=8), 0.05),
}


def sometimes(share: float, right: int, seed: int = 1) -> Accepted:
    """So many are right at a share of all places, drawn once."""
    places = Random(seed).choices((0, right), (1 - share, share), k=9999)
    return lambda at: places[at % len(places)]


GAINING = {
    "two of four right, rows cheap": (Scripted(4, sometimes(0.8, 2)), 0.02),
    "copies, 8 right": (Scripted(8, sometimes(0.9, 8)), 0.02),
    "one in two right, rows dear": (Scripted(4, sometimes(0.7, 1)), 0.08),
    "one in four right, rows cheap": (Scripted(8, sometimes(0.3, 1)), 0.02),
    "draft model, 3 of 4 right": (
        Scripted(4, sometimes(0.8, 3), each=0.2, reading=0.01),
        0.02,
    ),
    "0.4 a step, 3 of 4 right": (Scripted(4, sometimes(0.8, 3), drafting=0.4), 0.02),
    "copies in one step of 4": (Scripted(8, lambda at: 8, every=4), 0.05),
    "prompt rows": (Scripted(8, sometimes(0.6, 2), positions=256), 0.03),
}


def ratios(
    script: Scripted,
    row: float,
    length: int,
    sequences: int = 10,
    noise: float = 0.0,
    pauses: float = 0.0,
    seeds: int = 1,
    against: Scripted = PLAIN,
) -> tuple[float, float]:
    """Time over that of ``against``, unguarded: the first and the last sequence.

    Noise moves what the guard sees and is left out of the times that are compared.
    """
    firsts, lasts = [], []
    for seed in range(seeds):
        machine = Machine(row, noise=noise, pauses=pauses, seed=seed)
        memory = GuardMemory(PlainTimes())
        times = []
        for number in range(sequences):
            at = length * (seed * sequences + number)
            exact = decode(machine, script, length, memory=memory, at=at).exact
            times.append(exact / decode(Machine(row), against, length, at=at).exact)
        firsts.append(times[0])
        lasts.append(times[-1])
    return sum(firsts) / seeds, sum(lasts) / seeds


def comes_back(script: Scripted, row: float, useless: int) -> float:
    """Median tokens from where drafting begins to pay until it is asked in each step.

    That is to say four times in a row. Of texts that begin to pay at places around the
    token ``useless``.
    """
    found = []
    for start in range(useless, useless + 100, 7):
        paying = partial(_from, script.accepted, start)
        changing = replace(script, accepted=paying)
        done = decode(Machine(row), changing, start + 1500, memory=GuardMemory())
        later = [(at, asked) for at, asked in done.trace if at >= start]
        fours = zip(later, later[1:], later[2:], later[3:], strict=False)
        back = next(
            (four[0][0] for four in fours if all(asked for _, asked in four)),
            start + 1500,
        )
        found.append(back - start)
    return median(found)


def _from(accepted: Accepted, start: int, at: int) -> int:
    return accepted(at) if at >= start else 0


def _until(accepted: Accepted, end: int, at: int) -> int:
    return accepted(at) if at < end else 0


def after_good(script: Scripted, row: float, length: int) -> float:
    """Time over plain decoding of a useless sequence after nine good ones."""
    machine, memory = Machine(row), GuardMemory()
    for number in range(9):
        decode(machine, script, length, memory=memory, at=number * length)
    useless = replace(script, accepted=never)
    done = decode(machine, useless, length, memory=memory).exact
    return done / decode(Machine(row), PLAIN, length).exact


def table(title: str, columns: Sequence[str]) -> Table:
    """With a first column of labels."""
    made = Table(title=title, title_justify="left")
    for column in ("", *columns):
        made.add_column(column)
    return made


@click.command()
@click.option("--seeds", default=20, show_default=True, help="Of noise.")
def main(seeds: int) -> None:
    """Print what is lost, what is left of the gains, and how soon drafting is back."""
    console = Console(width=140)
    conditions = (
        ("", 0.0, 0.0),
        (", noise 10%", 0.1, 0.0),
        (", and pauses", 0.1, 0.02),
    )
    for name, noise, pauses in conditions:
        shown = table(
            f"Useless drafting: time over plain decoding{name}",
            ("32: first", "32: tenth", "200: first", "200: tenth"),
        )
        for label, (script, row) in LOSING.items():
            cells = [
                ratio
                for length in (32, 200)
                for ratio in ratios(
                    script, row, length, 10, noise, pauses, seeds if noise else 1
                )
            ]
            shown.add_row(label, *(f"{cell:.3f}" for cell in cells))
        console.print(shown)
        shown = table(
            f"Useful drafting: time over drafting in every step{name}",
            ("speed", "64: first", "64: tenth", "200: first", "200: tenth"),
        )
        for label, (script, row) in GAINING.items():
            plain = decode(Machine(row), PLAIN, 200).exact
            speed = plain / decode(Machine(row), script, 200).exact
            cells = [
                ratio
                for length in (64, 200)
                for ratio in ratios(
                    *(script, row, length, 10, noise, pauses),
                    seeds,
                    script,
                )
            ]
            shown.add_row(label, f"{speed:.2f}", *(f"{cell:.3f}" for cell in cells))
        console.print(shown)
    shown = table(
        "Useless at first: tokens until drafting is back", ("after 100", "after 1000")
    )
    for label, (script, row) in GAINING.items():
        shown.add_row(
            label,
            *(f"{comes_back(script, row, useless):.0f}" for useless in (100, 1000)),
        )
    console.print(shown)
    shown = table(
        "Useful and then never: time over plain decoding",
        (
            *("100 of 200 useful", "without the guard"),
            *("32 after good sequences", "200 after good sequences"),
        ),
    )
    for label, (script, row) in GAINING.items():
        ending = replace(script, accepted=partial(_until, script.accepted, 100))
        plain = decode(Machine(row), PLAIN, 200).exact
        done = decode(Machine(row), ending, 200, memory=GuardMemory())
        free = decode(Machine(row), ending, 200)
        cells = [
            done.exact / plain,
            free.exact / plain,
            *(after_good(script, row, length) for length in (32, 200)),
        ]
        shown.add_row(label, *(f"{cell:.3f}" for cell in cells))
    console.print(shown)


if __name__ == "__main__":
    main()
