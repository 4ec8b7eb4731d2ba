"""`adaptspec tune` killed at random moments: nothing is lost, nothing counted twice.

    python benchmarks/kills.py [--kills 20] [--seed 0]

A tune of a tiny random model runs undisturbed first, which says how long its parts
take. Then it is started again and again on one database and killed (SIGKILL), the last
one runs to its end. Where a kill falls is drawn: the part (loading, replay, trials,
confirmation), and the moment in it, or, among the trials, how many are finished by
then. A confirmation follows the last trial, so the kills in it come last. After every
kill what was finished before must still be there, unchanged. At the end no setting was
tried twice, no number was given twice, Optuna's studies hold the same finished trials
as the store, and every class is confirmed once.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from adaptspec_tuner.records import SPENT

CLASSES = ("a", "b")
STRATEGIES = ("prompt_lookup", "token_recycling")  # one that replays, one that doesn't
LOADING, REPLAY, TRIALS, CONFIRMATION = "loading", "replay", "trials", "confirmation"
DRAWN = (LOADING, REPLAY, TRIALS, CONFIRMATION)
# A run's parts as it writes them down when they end, the last first, and what follows.
AFTER = (
    *(("confirm", CONFIRMATION), ("trials", CONFIRMATION), ("replay", TRIALS)),
    *(("costs", REPLAY), ("plain", "hardware costs"), ("loading", "plain decoding")),
)
GLANCE_SECONDS = 0.05  # seconds between two looks at the store
# Nothing here is timed: no kernel is built, and one thread is enough for a tiny model.
ENVIRONMENT = {"ADAPTSPEC_NATIVE": "0", "OMP_NUM_THREADS": "1"}


def command(folder: Path, db: Path, trials: int) -> list[str]:
    """The tune."""
    return [
        *(sys.executable, "-m", "adaptspec", "tune", "--model", str(folder / "model")),
        *("--workload", str(folder / "prompts.jsonl"), "--db", str(db)),
        *("--strategies", ",".join(STRATEGIES), "--trials", str(trials), "-n", "8"),
        *("--dtype", "float32", "--budget", "20m", "--json"),
    ]


def prepare(folder: Path) -> None:
    """A tiny random model and four prompts of each class."""
    from adaptspec.testing.fakes import tiny_model, tiny_tokenizer

    model: Any = tiny_model("llama", tokenizer=tiny_tokenizer()).source
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = [
        json.dumps({"class": name, "prompt": f"w{i} w3 w4 w{5 + i} w3 w4"})
        for name in CLASSES
        for i in range(2, 6)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def from_store(db: Path, asked: Callable[[Any], Any]) -> Any:
    """What ``asked`` finds in the store; None where there is no database yet."""
    from adaptspec_profiles.sql import SqlStore

    if not db.exists():
        return None
    store = SqlStore(str(db))
    try:
        return asked(store)
    finally:
        store.close()


def finished(db: Path, run: str) -> tuple[dict[Any, Any], set[Any]]:
    """Key -> content of the stored trials, and what was confirmed."""

    def both(store: Any) -> tuple[dict[Any, Any], set[Any]]:
        trials = {(t.prompt_class, t.strategy, t.number): t for t in store.trials(run)}
        return trials, {(p.prompt_class, p.strategy) for p in store.profiles()}

    return from_store(db, both) or ({}, set())


def in_studies(db: Path) -> Counter[str]:
    """Study -> finished trials that weren't given up."""

    def count(store: Any) -> Counter[str]:
        storage = store.studies()
        return Counter(
            {
                study.study_name: sum(
                    t.state.is_finished() and "result" in t.user_attrs
                    for t in storage.get_all_trials(study._study_id)
                )
                for study in storage.get_all_studies()
                if not study.study_name.endswith("/records")
            }
        )

    counted: Counter[str] = from_store(db, count)
    return counted


class Running:
    """A tune that was started, seen by what it stores.

    Args:
        run: Its run's id.
    """

    def __init__(self, folder: Path, db: Path, trials: int, run: str) -> None:
        self._db, self._run = db, run
        self._before = self._parts()
        self.process = subprocess.Popen(
            command(folder, db, trials),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
        )

    def part(self) -> str:
        """What it is at, or was when it ended."""
        now = self._parts()
        for ended, following in AFTER:
            if now.get(ended) != self._before.get(ended):
                return following
        return LOADING

    def await_part(self, part: str) -> None:
        """Until it is at ``part``, or past it, or ended."""
        order = (LOADING, *(following for _, following in reversed(AFTER)))
        while self.process.poll() is None:
            if order.index(self.part()) >= order.index(part):
                return
            time.sleep(GLANCE_SECONDS)

    def await_trials(self, more: int) -> None:
        """Until ``more`` trials are finished, or it is past them, or ended."""
        wanted = len(finished(self._db, self._run)[0]) + more
        while self.process.poll() is None:
            if (
                len(finished(self._db, self._run)[0]) >= wanted
                or self.part() == CONFIRMATION
            ):
                return
            time.sleep(GLANCE_SECONDS)

    def kill(self) -> str:
        """At once; the part that it was at, or ``ended``."""
        ended = self.process.poll() is not None
        self.process.kill()
        self.process.wait()
        return "ended" if ended else self.part()

    def _parts(self) -> Mapping[str, float]:
        record = from_store(self._db, lambda store: store.record(self._run, SPENT))
        parts: Mapping[str, float] = (record or {}).get("parts", {})
        return parts


def undisturbed(folder: Path, trials: int) -> tuple[str, dict[str, float], int]:
    """A whole run: its id, the seconds of each part, and its trials."""
    db = folder / "undisturbed.db"
    started = time.monotonic()
    done = subprocess.run(
        command(folder, db, trials),
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    whole = time.monotonic() - started
    run = str(json.loads(done.stdout)["run"])
    record = from_store(db, lambda store: store.record(run, SPENT))
    parts = {name: float(seconds) for name, seconds in record["parts"].items()}
    seconds = {
        # Python's own start comes before what the run counts.
        LOADING: whole - sum(parts.values()) + parts["loading"],
        REPLAY: parts["replay"],
        TRIALS: parts["trials"],
        CONFIRMATION: parts["confirm"],
    }
    return run, seconds, len(finished(db, run)[0])


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--trials", default=40, show_default=True, help="Of each search.")
def main(kills: int, seed: int, trials: int) -> None:
    """Kill it, look, and start it again."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        db = folder / "p.db"
        run, seconds, usual = undisturbed(folder, trials)
        told = ", ".join(f"{part} {taken:.1f} s" for part, taken in seconds.items())
        click.echo(f"undisturbed: {usual} trials; {told}")
        planned = [chance.choice(DRAWN) for _ in range(kills)]
        planned.sort(key=lambda part: part == CONFIRMATION)
        before: tuple[dict[Any, Any], set[Any]] = ({}, set())
        hit: Counter[str] = Counter()
        for number, part in enumerate(planned):
            running = Running(folder, db, trials, run)
            if part == TRIALS:
                left = max(1, usual - len(before[0]))
                coming = planned[number:].count(TRIALS)
                running.await_trials(chance.randint(1, max(1, 2 * left // coming)))
                time.sleep(chance.random() * seconds[TRIALS] / usual)
            else:
                running.await_part(part)
                time.sleep(chance.random() * seconds[part])
            at = running.kill()
            hit[at] += 1
            after = finished(db, run)
            lost = [key for key in before[0] if after[0].get(key) != before[0][key]]
            assert not lost, f"lost or changed by kill {number + 1}: {lost}"
            assert before[1] <= after[1], f"profiles lost by kill {number + 1}"
            click.echo(
                f"kill {number + 1}, {at}: {len(after[0])} trials, "
                f"{len(after[1])} profiles"
            )
            before = after
        done = subprocess.run(
            command(folder, db, trials),
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        result = json.loads(done.stdout)
        after = finished(db, run)
        assert all(after[0].get(key) == value for key, value in before[0].items())
        settings = Counter(
            (t.prompt_class, t.strategy, json.dumps(dict(t.params), sort_keys=True))
            for t in after[0].values()
        )
        twice = [setting for setting, count in settings.items() if count > 1]
        assert not twice, f"tried twice: {twice}"
        stored = Counter(f"{run}/{c}/{s}" for c, s, _ in after[0])
        assert in_studies(db) == stored, (in_studies(db), stored)
        assert [c["class"] for c in result["classes"]] == list(CLASSES)
        places = ", ".join(f"{count} in {part}" for part, count in hit.most_common())
        click.echo(
            f"{kills} kills: {places}; {len(after[0])} trials, none lost, none twice, "
            f"{len(result['classes'])} classes confirmed"
        )


if __name__ == "__main__":
    main()
