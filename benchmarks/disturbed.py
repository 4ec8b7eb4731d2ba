"""Compares what a tune chooses on a disturbed machine and on a quiet one.

    python benchmarks/disturbed.py [--folder OUT] -- [arguments of `adaptspec tune`]

Runs the tune twice, on two new databases. During the second run a process for each
core loads it for ten seconds of every minute, and the tune is stopped (SIGSTOP) three
times for two seconds, at even distances of the time that the first run took. Prints
both choices of every class, and by how much the ratios of what both confirmed differ.
It needs no attention. With ``--folder`` a run that is there already isn't repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import psutil  # type: ignore[import-untyped]

QUIET, DISTURBED = "quiet", "disturbed"
LOAD = """
import sys, time
busy, every = float(sys.argv[1]), float(sys.argv[2])
while True:
    end = time.monotonic() + busy
    while time.monotonic() < end:
        pass
    time.sleep(every - busy)
"""


def tune(
    command: Sequence[str],
    *,
    load: tuple[float, float] | None = None,
    pauses: Sequence[float] = (),
    pause: float = 2.0,
) -> dict[str, Any]:
    """Run it to its end; what it prints as JSON, and ``seconds``.

    Args:
        load: Seconds that every core is kept busy, and of how many; None for no load.
        pauses: Seconds after the beginning at which it is stopped.
        pause: Seconds for which it is.

    Raises:
        ClickException: with its last lines, if it fails.
    """
    cores = len(os.sched_getaffinity(0)) if load else 0
    with ExitStack() as stack:
        for _ in range(cores):
            loading = [sys.executable, "-c", LOAD, *map(str, load or ())]
            other = stack.enter_context(subprocess.Popen(loading))
            stack.callback(other.kill)
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        started = time.monotonic()
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        )
        stack.callback(process.kill)
        ended = threading.Event()
        pausing = threading.Thread(
            target=_pause, args=(process, ended, started, sorted(pauses), pause)
        )
        pausing.start()
        try:
            output, _ = process.communicate()
        finally:
            ended.set()
            pausing.join()
        if process.returncode:
            errors.seek(0)
            last = "".join(errors.readlines()[-10:])
            raise click.ClickException(f"the tune failed:\n{last}")
        found: dict[str, Any] = json.loads(output)
        return {**found, "seconds": time.monotonic() - started}


def _pause(
    process: subprocess.Popen[str],
    ended: threading.Event,
    started: float,
    pauses: Sequence[float],
    seconds: float,
) -> None:
    for when in pauses:
        if ended.wait(max(0.0, started + when - time.monotonic())):
            return
        try:
            tuning = psutil.Process(process.pid)
            tuning.suspend()
            time.sleep(seconds)
            tuning.resume()
        except psutil.Error:  # it has ended
            return


def compared(quiet: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Choices and ratios of both, as ``tune --json`` tells them.

    Returns:
        ``classes``: class -> ``choices`` (of the quiet run and the other) and
        ``ratios``: strategy -> both ratios to plain decoding, and whether parameters
        were the same. ``missing``: classes of one run only. ``same``: in how many
        classes the chosen strategy is the same. ``settings`` and ``strategies``: how
        far ratios of the same settings, and of the same strategies, are from each
        other: 0.05 for 5%.
    """
    classes: dict[str, Any] = {}
    differences: dict[str, list[float]] = {"settings": [], "strategies": []}
    ours, theirs = (
        {found["class"]: found for found in one["classes"]} for one in (quiet, other)
    )
    for name in [name for name in ours if name in theirs]:
        rows = [
            {row["strategy"]: row for row in one[name]["results"]}
            for one in (ours, theirs)
        ]
        ratios = {}
        for strategy, row in rows[0].items():
            if strategy in rows[1] and strategy != "autoregressive":
                after = rows[1][strategy]
                same = row["params"] == after["params"]
                ratios[strategy] = [row["ratio"], after["ratio"], same]
                difference = abs(after["ratio"] / row["ratio"] - 1)
                differences["strategies"].append(difference)
                if same:
                    differences["settings"].append(difference)
        choices = [one[name]["winner"] for one in (ours, theirs)]
        classes[name] = {"choices": choices, "ratios": ratios}
    return {
        "classes": classes,
        "missing": sorted(set(ours) ^ set(theirs)),
        "same": sum(c["choices"][0] == c["choices"][1] for c in classes.values()),
        **differences,
    }


def show(found: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Print them."""
    for name, told in found["classes"].items():
        one, other = told["choices"]
        same = "the same strategy" if one == other else "ANOTHER STRATEGY"
        click.echo(f"{name}: quiet {one}, disturbed {other}: {same}")
        for strategy, (before, after, equal) in told["ratios"].items():
            params = "" if equal else " (other parameters)"
            change = f"{after / before - 1:+.1%}"
            click.echo(f"    {before:.3f} {after:.3f} {change}  {strategy}{params}")
    if found["missing"]:
        click.echo(f"confirmed in one run only: {', '.join(found['missing'])}")
    for name, run in runs.items():
        click.echo(f"{name}: {run['seconds']:.0f} s")
        for note in run.get("notes", ()):
            if "held up" in note or "other programs" in note or "explain" in note:
                click.echo(f"    {note}")
    click.echo(
        f"the same strategy in {found['same']} of {len(found['classes'])} classes"
    )
    for what in ("settings", "strategies"):
        if values := found[what]:
            click.echo(
                f"ratios of the same {what} ({len(values)}) differ by "
                f"{fmean(values):.1%} in the mean, {max(values):.1%} at most"
            )
        else:
            click.echo(f"the same {what}: none was confirmed in both")


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), help="Keeps all."
)
@click.option("--busy", default=10.0, show_default=True, help="Seconds of load...")
@click.option("--every", default=60.0, show_default=True, help="...of so many.")
@click.option("--pauses", default=3, show_default=True, help="How often it is stopped.")
@click.option("--pause", default=2.0, show_default=True, help="For how many seconds.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    folder: Path | None,
    busy: float,
    every: float,
    pauses: int,
    pause: float,
    arguments: tuple[str, ...],
) -> None:
    """Tune with ARGUMENTS, quiet and disturbed, and compare."""
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        runs: dict[str, dict[str, Any]] = {}
        for name in (QUIET, DISTURBED):
            path = folder / f"{name}.json"
            if not path.exists():
                command = [sys.executable, "-m", "adaptspec", "tune", *arguments]
                command += ["--db", str(folder / f"{name}.db"), "--fresh", "--json"]
                click.echo(f"{name}: {' '.join(command)}", err=True)
                more: dict[str, Any] = {}
                if name == DISTURBED:
                    taken = runs[QUIET]["seconds"]
                    whens = [taken * (at + 0.5) / pauses for at in range(pauses)]
                    more = {"load": (busy, every), "pauses": whens, "pause": pause}
                path.write_text(json.dumps(tune(command, **more)))
            runs[name] = json.loads(path.read_text())
        show(compared(runs[QUIET], runs[DISTURBED]), runs)


if __name__ == "__main__":
    main()
