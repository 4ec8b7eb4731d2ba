"""`adaptspec tune` killed at random moments: nothing is lost, nothing counted twice.

    python benchmarks/kills.py [--kills 20] [--seed 0]

A tune of a tiny random model is started again and again on one database and killed
(SIGKILL) after a random time, the last one runs to its end. After every kill what was
finished before must still be there, unchanged. At the end no setting was tried twice,
no number was given twice, Optuna's studies hold the same finished trials as the store,
and every class is confirmed once.
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
from pathlib import Path
from typing import Any

import click

CLASSES = ("a", "b")
STRATEGIES = ("prompt_lookup", "token_recycling")  # one that replays, one that doesn't
# Nothing here is timed: no kernel is built, and one thread is enough for a tiny model.
ENVIRONMENT = {"ADAPTSPEC_NATIVE": "0", "OMP_NUM_THREADS": "1"}


def command(folder: Path, trials: int) -> list[str]:
    """The tune."""
    return [
        *(sys.executable, "-m", "adaptspec", "tune", "--model", str(folder / "model")),
        *("--workload", str(folder / "prompts.jsonl"), "--db", str(folder / "p.db")),
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


def finished(db: Path) -> tuple[dict[Any, Any], set[Any]]:
    """Key -> content of the stored trials, and what was confirmed."""
    from adaptspec_profiles.sql import SqlStore

    if not db.exists():
        return {}, set()
    store = SqlStore(str(db))
    try:
        runs = {p.run for p in store.profiles()} | _runs(store)
        trials = {
            (t.run, t.prompt_class, t.strategy, t.number): t
            for run in runs
            for t in store.trials(run)
        }
        profiles = {(p.run, p.prompt_class, p.strategy) for p in store.profiles()}
        return trials, profiles
    finally:
        store.close()


def _runs(store: Any) -> set[str]:
    names = [study.study_name for study in store.studies().get_all_studies()]
    return {name.split("/")[0] for name in names}


def in_studies(db: Path) -> Counter[str]:
    """Study -> finished trials that weren't given up."""
    from adaptspec_profiles.sql import SqlStore

    store = SqlStore(str(db))
    try:
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
    finally:
        store.close()


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--trials", default=40, show_default=True)
def main(kills: int, seed: int, trials: int) -> None:
    """Kill it, look, and start it again."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        db = folder / "p.db"
        started = time.monotonic()
        environment = {**os.environ, **ENVIRONMENT}
        subprocess.run(
            command(folder, 1), check=True, capture_output=True, env=environment
        )
        whole = time.monotonic() - started  # the shortest run, loading and all
        click.echo(f"a run of one trial each takes {whole:.1f} s")
        db.unlink()
        before: tuple[dict[Any, Any], set[Any]] = ({}, set())
        killed = 0
        for number in range(kills):
            delay = chance.uniform(0.2, 1.3) * whole
            process = subprocess.Popen(
                command(folder, trials),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
            time.sleep(delay)
            killed += process.poll() is None
            process.kill()
            process.wait()
            after = finished(db)
            lost = [key for key in before[0] if after[0].get(key) != before[0][key]]
            assert not lost, f"lost or changed by kill {number + 1}: {lost}"
            assert before[1] <= after[1], f"profiles lost by kill {number + 1}"
            click.echo(
                f"kill {number + 1} after {delay:.1f} s: {len(after[0])} trials, "
                f"{len(after[1])} profiles"
            )
            before = after
        done = subprocess.run(
            command(folder, trials),
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        result = json.loads(done.stdout)
        after = finished(db)
        assert all(after[0].get(key) == value for key, value in before[0].items())
        settings = Counter(
            (t.prompt_class, t.strategy, json.dumps(dict(t.params), sort_keys=True))
            for t in after[0].values()
        )
        twice = [setting for setting, count in settings.items() if count > 1]
        assert not twice, f"tried twice: {twice}"
        stored = Counter(f"{run}/{c}/{s}" for run, c, s, _ in after[0])
        assert in_studies(db) == stored, (in_studies(db), stored)
        assert [c["class"] for c in result["classes"]] == list(CLASSES)
        click.echo(
            f"{killed} of {kills} killed while running; {len(after[0])} trials, none "
            f"lost, none twice, {len(result['classes'])} classes confirmed"
        )


if __name__ == "__main__":
    main()
