"""Which model families decode how: every causal LM of transformers, tiny and random.

Each family of the installed transformers is built tiny, and every installed strategy's
output on it, greedy and sampled, is compared with the model's own ``generate``.

    python benchmarks/families.py --markdown docs/families.md
    python benchmarks/families.py --only gpt_neo,phi3+longrope --dtype float32

The exit status is 1 if any output is wrong.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import click
import psutil  # type: ignore[import-untyped]
import torch
import transformers

from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from family_checks import Report, check
from tiny_families import case_names, class_name, prompts_of, tiny_module

DTYPES = ("float32", "bfloat16")
SECONDS, GIBIBYTES = 180.0, 4.0  # of one family in one type


@dataclass(frozen=True)
class Row:
    """One family in one type.

    Args:
        name: Its model type, and what its configuration is varied in.
        cls: The class of the model.
        dtype: Of its weights.
        seconds: Building, comparing and all.
        report: What it came to.
    """

    name: str
    cls: str
    dtype: str
    seconds: float
    report: Report

    @property
    def wrong(self) -> bool:
        """Whether an output, or the program, is wrong."""
        return bool(self.report.wrong)


def examine(name: str, dtype: str, host: Host) -> Report:
    """Build one family and check it."""
    try:
        module = tiny_module(name).to(getattr(torch, dtype))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Report(
            "not built", f"{type(error).__name__}: {lines[-1] if lines else ''}"
        )
    return check(module, host, prompts_of(name))


def sweep(
    names: Sequence[str],
    dtypes: Sequence[str],
    jobs: int,
    seconds: float = SECONDS,
    gibibytes: float = GIBIBYTES,
) -> Iterator[Row]:
    """Every family in a process of its own, so that none can end the others.

    The processes are forked from this one, which has imported and measured everything.
    """
    host = Host.installed()
    _warm(host, dtypes)
    waiting = [(name, dtype) for name in names for dtype in dtypes]
    running: dict[Connection, tuple[str, str, Any, float]] = {}
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < jobs:
            name, dtype = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(theirs, name, dtype, host, gibibytes)
            )
            process.start()
            theirs.close()
            running[ours] = (name, dtype, process, time.monotonic())
        for ours in _due(running, seconds):
            name, dtype, process, began = running.pop(ours)
            took = time.monotonic() - began
            report = _received(ours, process, took, seconds)
            process.join()
            ours.close()
            yield Row(name, class_name(name), dtype, took, report)


def _due(
    running: dict[Connection, tuple[str, str, Any, float]], seconds: float
) -> list[Connection]:
    """Those that answered, died or have had their time."""
    ready = wait(list(running), timeout=1.0)
    now = time.monotonic()
    late = [c for c, (_, _, _, began) in running.items() if now - began > seconds]
    return [c for c in running if c in ready or c in late]


def _received(ours: Connection, process: Any, took: float, seconds: float) -> Report:
    if ours.poll():
        try:
            answer: Report = ours.recv()
        except EOFError:
            process.join()
            code = process.exitcode
            death = signal.Signals(-code).name if code < 0 else f"exit {code}"
            report = Report("crashed", f"the process died: {death}")
            report.blame("process", report.reason)
            return report
        return answer
    process.kill()
    report = Report("crashed", f"not done after {took:.0f} s of {seconds:.0f} s")
    report.blame("process", report.reason)
    return report


def _child(
    theirs: Connection, name: str, dtype: str, host: Host, gibibytes: float
) -> None:
    grown = psutil.Process().memory_info().vms + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (grown, grown))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _quietly()
    try:
        report = examine(name, dtype, host)
    except BaseException as error:
        traceback.print_exc()
        report = Report("crashed", f"{type(error).__name__}: {error}")
        report.blame("process", report.reason)
    theirs.send(report)
    theirs.close()


def _quietly() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _warm(host: Host, dtypes: Sequence[str]) -> None:
    """Import, compile and measure here what each process would have to again."""
    _quietly()
    torch.set_num_threads(1)
    _ = host.strategies
    for dtype in dtypes:
        model = LanguageModel(tiny_module("llama").to(getattr(torch, dtype)))
        _ = model.capability


def versions() -> dict[str, str]:
    """What the table holds for."""
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def verdict(report: Report) -> str:
    """How a family decodes, in a word or two."""
    return f"WRONG ({report.level})" if report.wrong else report.level


def totals(rows: Sequence[Row], dtype: str) -> str:
    """How many families there are of each verdict."""
    counts = Counter(verdict(row.report) for row in rows if row.dtype == dtype)
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


HEAD = """\
# Which model families decode how

    python benchmarks/families.py --markdown docs/families.md

made this page: every class that `AutoModelForCausalLM` can build is built tiny and
random, and every installed strategy's output on it is compared with the model's own
`generate`. The command ends with status 1 if any output is wrong.

* **trees**: every strategy runs. **chains**: those that need no tree attention.
* **plain**: one token per forward pass, with the model's own cache; drafts can't be
  verified. **plain, no cache**: the whole text is read for each token, because no cache
  gives what `generate` gives.
* **refused**: loading or decoding ends with one line that says why.
* **not comparable**: transformers' own `generate` raises on the tiny model.
* **not built**: transformers can't build it here from a configuration.

Prompts have one token, five, twelve, 39, and 27 that repeat themselves; windows and
chunks are 16 positions, so that outputs cross them. A `+` says in what a variant's
configuration differs from its family's default: a rotary scaling whose original length
is 32 positions, or a window or chunk of 80, with prompts beyond.

*Outputs* are greedy ones, compared token for token, and sampled ones, compared with
plain sampling of the same seed where a strategy's drafts are deterministic. The logits
that decided each token, of both, are compared with those that `generate` has when it is
forced along the same output, and the sampled distributions with their softmax. *Ties*
are outputs that leave `generate` where two tokens' logits differ by no more than
rounding moves them on that model, measured against `generate` in the next wider type.
`universal_draft` needs tokenizers and has tests of its own.

"""


def page(rows: Sequence[Row], dtypes: Sequence[str]) -> str:
    """The table as Markdown."""
    found = versions()
    lines = [
        f"transformers {found['transformers']}, torch {found['torch']}, on a CPU.",
        "",
    ]
    lines += [f"* {dtype}: {totals(rows, dtype)}" for dtype in dtypes]
    titles = ["family", "class"]
    for dtype in dtypes:
        titles += [dtype, "outputs", "ties"]
    lines += ["", f"| {' | '.join(titles)} | why |", "|---" * (len(titles) + 1) + "|"]
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, {})[row.dtype] = row
    for name, found_rows in sorted(by_name.items()):
        cells = [name, next(iter(found_rows.values())).cls]
        for dtype in dtypes:
            report = found_rows[dtype].report
            wrong = report.compared - report.equal - report.ties
            outputs = f"{report.compared}" + (f", {wrong} wrong" if wrong else "")
            cells += [verdict(report), outputs, str(report.ties)]
        reasons = dict.fromkeys(found_rows[d].report.reason for d in dtypes)
        cells.append("; ".join(_short(reason) for reason in reasons if reason))
        lines.append(f"| {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n"


def _short(reason: str, most: int = 160) -> str:
    """Safe in a table's cell."""
    text = " ".join(reason.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= most else text[: most - 3] + "..."


@click.command()
@click.option("--only", default="", help="families, separated by commas")
@click.option("--dtype", default=",".join(DTYPES), show_default=True)
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True)
@click.option("--seconds", default=SECONDS, show_default=True, help="for one family")
@click.option("--markdown", type=click.Path(path_type=Path), help="write the page here")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    only: str,
    dtype: str,
    jobs: int,
    seconds: float,
    markdown: Path | None,
    json_file: Path | None,
) -> None:
    """Compare every strategy with generate on every family of transformers."""
    names = only.split(",") if only else case_names()
    if unknown := sorted(set(names) - set(case_names())):
        raise click.ClickException(f"no family {', '.join(unknown)}")
    dtypes = dtype.split(",")
    began = time.monotonic()
    rows = []
    for row in sweep(names, dtypes, jobs, seconds):
        rows.append(row)
        report = row.report
        click.echo(
            f"{row.name:24} {row.dtype:9} {verdict(report):16} "
            f"{report.equal}+{report.ties}/{report.compared} {row.seconds:.1f}s "
            f"{report.reason[:90]}"
        )
        for strategy, problems in report.wrong.items():
            click.echo(f"    {strategy}: {problems[0]} ({len(problems)} in all)")
    if json_file is not None:
        document = {
            "versions": versions(),
            "seconds": time.monotonic() - began,
            "families": [{**asdict(row)} for row in rows],
        }
        json_file.write_text(json.dumps(document, indent=1))
    if markdown is not None:
        markdown.write_text(page(rows, dtypes))
    for each in dtypes:
        click.echo(f"{each}: {totals(rows, each)}")
    if any(row.wrong for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
