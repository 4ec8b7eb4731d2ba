"""transformers' own generation tests of decoder-only models, against the drop-in.

A checkout of transformers at the installed version has the tests; its package on the
registry has none. Each runs twice: with the model's own ``generate``, and with
:class:`~adaptspec.drop_in.speed_up.SpeedUp` in its place for every model. A greedy
output that isn't the same as the model's own fails the test, whatever else it checks.

    git clone --branch v5.24.0 https://github.com/huggingface/transformers
    pip install parameterized
    python benchmarks/transformers_tests.py transformers

What a test came to is one of: ``passes``; ``refused``, with the argument that can't be
honoured; ``fails``; ``not applicable`` where it asks for no generation, or fails or is
skipped with the model's own ``generate``. The exit status is 1 if any fails.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

MODELS = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "opt", "phi")
STRATEGY = "ADAPTSPEC_TESTED_STRATEGY"  # in the environment of pytest; empty: plain
FOUND = "ADAPTSPEC_TESTED_FOUND"  # the file that pytest writes outcomes to


class Outcomes:
    """A pytest plugin: puts the drop-in in place, and notes what each test came to.

    Args:
        strategy: What drafts, whatever the model; empty: nothing is put in place.
        path: Where outcomes are written to, as JSON.
    """

    def __init__(self, strategy: str, path: Path) -> None:
        self.strategy, self.path = strategy, path
        self.found: dict[str, dict[str, Any]] = {}
        self.calls = 0
        self._inside = False

    def pytest_sessionstart(self) -> None:
        """Put the drop-in in the place of every model's ``generate``."""
        from transformers import GenerationMixin

        from adaptspec.host import Host

        self.host = Host.installed()
        plain = GenerationMixin.generate

        @functools.wraps(plain)
        def generate(model: Any, *args: Any, **given: Any) -> Any:
            self.calls += not self._inside
            if self._inside or not self.strategy or given.get("custom_generate"):
                return plain(model, *args, **given)
            self._inside = True
            try:
                return self._checked(model, plain, args, given)
            finally:
                self._inside = False

        GenerationMixin.generate = generate  # type: ignore[method-assign]

    def _checked(
        self, model: Any, plain: Any, args: Sequence[Any], given: Mapping[str, Any]
    ) -> Any:
        """The drop-in's output, known to be the model's own where it is greedy."""
        from adaptspec.decoder import load
        from adaptspec.drop_in.speed_up import SpeedUp

        decoder = load(model, db="memory:", host=self.host)
        found = SpeedUp(model, decoder, strategy=self.strategy)(*args, **given)
        config = given.get("generation_config") or model.generation_config
        if given.get("do_sample", config.do_sample) or given.get("streamer"):
            return found
        expected = plain(model, *args, **given)
        mine, theirs = (getattr(one, "sequences", one) for one in (found, expected))
        if mine.tolist() != theirs.tolist():
            raise AssertionError(f"{mine.tolist()} isn't generate's {theirs.tolist()}")
        return found

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        """Note a test's outcome, and why."""
        outcome: Any = yield
        report = outcome.get_result()
        if report.when == "setup":
            self.calls = 0
        if report.when == "call" or report.outcome != "passed":
            error = call.excinfo
            self.found[item.nodeid] = {
                "outcome": report.outcome,
                "calls": self.calls,
                "error": error and error.typename,
                "why": error and (str(error.value).splitlines() or [""])[0],
            }

    def pytest_sessionfinish(self) -> None:
        """Hand the outcomes over."""
        self.path.write_text(json.dumps(self.found), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """pytest's side of this file."""
    outcomes = Outcomes(os.environ[STRATEGY], Path(os.environ[FOUND]))
    config.pluginmanager.register(outcomes, "adaptspec-outcomes")


def outcomes_of(
    checkout: Path, models: Sequence[str], strategy: str, only: str
) -> dict[str, dict[str, Any]]:
    """Run the models' generation tests in a process of their own.

    Args:
        strategy: Empty: with the models' own ``generate``.
        only: As ``-k`` of pytest.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        files = [f"tests/models/{m}/test_modeling_{m}.py" for m in models]
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no"]
        command += ["-p", "transformers_tests", "-p", "no:cacheprovider"]
        command += ["-k", only, *files]
        here = str(Path(__file__).parent)
        done = subprocess.run(
            command,
            cwd=checkout,
            env={
                **os.environ,
                STRATEGY: strategy,
                FOUND: str(path),
                "PYTHONPATH": os.pathsep.join([here, *filter(None, sys.path)]),
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if not path.exists():
            raise click.ClickException(f"pytest ran no test: {done.stdout[-2000:]}")
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    if not found:
        raise click.ClickException(f"pytest found no test: {done.stdout[-2000:]}")
    return found


def judged(plain: Mapping[str, Any], fast: Mapping[str, Any]) -> tuple[str, str]:
    """What a test came to, and why."""
    if plain["outcome"] != "passed":
        why = plain["why"] or plain["outcome"]
        return "not applicable", f"{plain['outcome']} with generate itself: {why}"
    if not plain["calls"]:
        return "not applicable", "generates nothing"
    if fast["outcome"] == "passed":
        return "passes", ""
    if fast["error"] == "UnsupportedControlError":
        return "refused", fast["why"]
    return "fails", f"{fast['error']}: {fast['why']}"


@click.command()
@click.argument("checkout", type=click.Path(exists=True, file_okay=False))
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("-s", "--strategy", default="prompt_lookup", show_default=True)
@click.option(
    "-k",
    "--only",
    # Their mark is lost on those with parameters.
    default="generate or decoding",
    show_default=True,
    help="Which tests, by their names, as of pytest.",
)
def main(checkout: str, models: str, strategy: str, only: str) -> None:
    """Print what the generation tests in CHECKOUT come to, as Markdown."""
    names = models.split(",")
    plain = outcomes_of(Path(checkout), names, "", only)
    fast = outcomes_of(Path(checkout), names, strategy, only)
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    reasons: dict[str, set[str]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for node, before in plain.items():
        verdict, why = judged(before, fast[node])
        test = node.rpartition("::")[2]
        rows[test][verdict].append(node.split("/")[2])
        counts[verdict] += 1
        if why:
            reasons[test].add(why)
    verdicts = ("passes", "refused", "fails", "not applicable")
    print(f"| test | {' | '.join(verdicts)} | why |\n|---|{'---|' * 5}")
    for test, by in sorted(rows.items()):
        cells = [
            ("all" if len(by[v]) == len(names) else ", ".join(by[v])) for v in verdicts
        ]
        why = "; ".join(sorted(reasons[test])).replace("|", "\\|")
        print(f"| {' | '.join(cell or '-' for cell in (test, *cells, why))} |")
    print("\n" + ", ".join(f"{counts[v]} {v}" for v in verdicts))
    sys.exit(counts["fails"] > 0)


if __name__ == "__main__":
    main()
