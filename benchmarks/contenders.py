"""The contenders: our strategies, Hugging Face's, and vLLM in its own process."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine, Run
from adaptspec.host import Host
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Strategy

HF, PLAIN = "hf_generate", "autoregressive"

# Theirs, shorter than their defaults too, which may not be their best.
SWEEP = {
    "hf_prompt_lookup": ("prompt_lookup_num_tokens", (3, 5, 10)),
    "hf_assisted": ("num_assistant_tokens", (3, 5, 20)),
}
# Ours -> theirs of the same kind; the others are held against all of theirs.
RIVALS = {"prompt_lookup": "hf_prompt_lookup", "draft_model": "hf_assisted"}
THEIRS = ("hf_generate", "hf_prompt_lookup", "hf_assisted")

# ids, new tokens -> tokens, ms a token, tokens per forward
# place in the answer, the target's choice -> the token that is taken
Follow = Callable[[int, int], int]
Contender = Callable[[Sequence[int], int], tuple[list[int], float, float | None]]


class Ours:
    """One of our strategies; ``keep`` lets it remember earlier prompts."""

    def __init__(
        self,
        engine: Engine,
        host: Host,
        name: str,
        params: Mapping[str, Any],
        keep: bool = False,
    ) -> None:
        self._engine = engine
        self._create: Callable[[], Strategy] = partial(host.create, name, params)
        self._held = self._create() if keep else None

    def warm_up(self, ids: Sequence[int], length: int) -> None:
        """Decode once with a strategy that is then forgotten.

        A first call is slow and its answer short: no lesson for a gate that remembers.
        """
        exhaust(self._begin(self._create(), ids, length))

    def begin(
        self, ids: Sequence[int], length: int, follow: Follow | None = None
    ) -> Run:
        """A generation to iterate over."""
        return self._begin(self._held or self._create(), ids, length, follow)

    def _begin(
        self,
        strategy: Strategy,
        ids: Sequence[int],
        length: int,
        follow: Follow | None = None,
    ) -> Run:
        controls = Controls.for_model(
            self._engine.model, temperature=0, max_new_tokens=length
        )
        return Run(self._engine, strategy, ids, controls, follow)

    def __call__(
        self, ids: Sequence[int], length: int
    ) -> tuple[list[int], float, float | None]:
        """As every contender."""
        run = self.begin(ids, length)
        exhaust(run)
        return measured(run)


def exhaust(steps: Iterable[Any]) -> None:
    """Take them all."""
    for _ in steps:
        pass


def measured(run: Run) -> tuple[list[int], float, float | None]:
    """What a contender answers, of a generation that is over."""
    stats = run.result.stats
    speed = stats.tokens_per_second
    return (
        run.result.token_ids,
        1e3 / speed if speed else float("nan"),
        stats.tokens_per_forward,
    )


def theirs(
    model: LanguageModel,
    draft: LanguageModel | None,
    host: Host,
    name: str,
    params: Mapping[str, Any],
) -> Contender:
    """One of Hugging Face's, on an untouched model."""
    cls = host.baselines[name]
    baseline = cls(cls.Params.parse(params, name))

    def run(ids: Sequence[int], length: int) -> tuple[list[int], float, float | None]:
        done = baseline.run(model, draft, ids, length)
        speed = done.tokens_per_second
        forwards = done.target_forwards
        decoded = len(done.token_ids) - done.first_tokens
        return (
            done.token_ids,
            1e3 / speed if speed else float("nan"),
            decoded / forwards if forwards else None,
        )

    return run


class Peer:
    """Another engine in its own process and Python, asked prompt by prompt.

    Args:
        python: The interpreter that has it.
        script: A file beside this one: a JSON line per prompt in, one per answer out.
        arguments: The script's.

    Raises:
        ClickException: with the last lines it printed, where it ends.
    """

    def __init__(self, python: str, script: str, *arguments: str) -> None:
        self._name = script
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-20:]
            raise click.ClickException(f"{self._name} ended:\n" + "\n".join(last))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(
        self, ids: Sequence[int], length: int
    ) -> tuple[list[int], float, float | None]:
        """As every contender."""
        assert self._process.stdin is not None
        asked = json.dumps({"ids": list(ids), "length": length})
        print(asked, file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["tokens"], answer["ms_per_token"], None

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
