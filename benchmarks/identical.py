"""Whether strategies give plain decoding's tokens, and plain decoding generate's.

    python benchmarks/identical.py MODEL --draft-model D --workload W --prompts 70
        -s hybrid -s suffix -s draft_model --json identical.json

Answers are written as they come. What the file already holds isn't decoded again, so
that a long check may be stopped and started anew (``--seconds``). Strategies keep what
they learn from prompt to prompt, and the guard that ends slow drafting is off. A prompt
is read once, and every contender goes on from a copy of what was cached. Plain
decoding is compared with ``generate`` of the untouched model on ``--generate`` prompts;
that model is loaded once all else is done, so that only one is in memory.

A difference is a near tie where the logits of the two tokens are no further apart than
the type rounds, told by a fresh forward over the text before it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import click
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.near_ties import near_tie
from adaptspec.host import Host
from adaptspec.model.cache import TreeCache
from adaptspec.model.forward import Forward
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.workloads import read_workload
from adaptspec_tuner.measuring.profiler import first_difference
from contenders import HF, PLAIN, theirs

# prompt id -> contender -> its answer
Answers = dict[str, dict[str, list[int]]]


class ReadOnce:
    """Stands for a model's ``prefill``: a prompt that comes again isn't read again.

    Args:
        model: Its ``prefill`` is replaced by this.
        rows: At how many tokens logits are kept; who asks for more has it read anew.
    """

    def __init__(self, model: LanguageModel, rows: int = 64) -> None:
        self._prefill, self._rows = model.prefill, rows
        self._read: tuple[list[int], TreeCache, Forward] | None = None
        model.prefill = self  # type: ignore[method-assign]

    @torch.inference_mode()
    def __call__(
        self, tokens: Sequence[int], cache: Any, *, last: int = 1, **more: Any
    ) -> Forward:
        fresh = type(cache) is TreeCache and not cache.length
        if not fresh or last > self._rows or any(more.values()):
            return self._prefill(tokens, cache, last=last, **more)
        if self._read is None or self._read[0] != list(tokens):
            kept = TreeCache(len(cache.rows))
            forward = self._prefill(tokens, kept, last=self._rows)
            self._read = list(tokens), kept, forward
        _, kept, forward = self._read
        for mine, row in zip(cache.rows, kept.rows, strict=True):
            if row.keys is not None and row.values is not None:
                mine.update(
                    row.keys[:, :, : row.length], row.values[:, :, : row.length]
                )
        logits = forward.logits[-last:]
        first = len(tokens) - len(logits)
        return Forward(logits, {first + i: i for i in range(len(logits))})


def verdict(
    model: LanguageModel, ids: Sequence[int], plain: Sequence[int], other: Sequence[int]
) -> str:
    """``identical``, ``near_tie`` or ``mismatch``, with the place where they part."""
    if list(plain) == list(other):
        return "identical"
    at = first_difference(plain, other)
    if at is None:
        return f"mismatch at {min(len(plain), len(other))} (one is shorter)"
    text = [*ids, *plain[:at]]
    logits = model.prefill(text, model.new_cache(len(text))).logits[-1]
    tied = near_tie(logits, plain[at], other[at], model.dtype)
    told = f"{float(logits[plain[at]]):.4f} and {float(logits[other[at]]):.4f}"
    return f"{'near_tie' if tied else 'mismatch'} at {at} (logits {told})"


@click.command()
@click.argument("path", metavar="MODEL")
@click.option("--draft-model")
@click.option("--workload", type=Path, required=True)
@click.option("--prompts", "count", default=70, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="of each answer, at most")
@click.option("-s", "--strategy", "strategies", multiple=True, required=True)
@click.option("--generate", default=6, show_default=True, help="prompts for generate")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--seconds", type=float, help="stop after the prompt in which they end")
@click.option("--json", "out", type=Path, required=True, help="answers and verdicts")
def main(
    path: str,
    draft_model: str | None,
    workload: Path,
    count: int,
    tokens: int,
    strategies: tuple[str, ...],
    generate: int,
    dtype: str,
    seconds: float | None,
    out: Path,
) -> None:
    """Compare the answers of strategies with plain decoding's on MODEL."""
    started = monotonic()
    settings = {"model": path, "draft": draft_model, "dtype": dtype, "tokens": tokens}
    kept: dict[str, Any] = {"settings": settings, "answers": {}, "verdicts": {}}
    if out.exists():
        kept = json.loads(out.read_text())
        if kept["settings"] != settings:
            raise click.UsageError(
                f"{out} holds answers of {kept['settings']}, asked for are {settings}; "
                "name another file"
            )
    prompts = read_workload(workload).limit(count).prompts
    host = Host.installed()

    def is_open() -> bool:
        return seconds is None or monotonic() - started < seconds

    def take(
        model: LanguageModel,
        names: Sequence[str],
        answer: Callable[[str, list[int]], list[int]],
        most: int,
    ) -> None:
        for prompt in prompts[:most]:
            answers: dict[str, list[int]] = kept["answers"].setdefault(prompt.id, {})
            missing = [name for name in names if name not in answers]
            if not missing:
                continue
            if not is_open():
                return
            ids = prompt.encode(model)
            for name in missing:
                answers[name] = answer(name, ids)
                if name != PLAIN:
                    found = verdict(model, ids, answers[PLAIN], answers[name])
                    kept["verdicts"].setdefault(name, {})[prompt.id] = found
            out.write_text(json.dumps(kept))
            click.echo(f"{prompt.id} ({prompt.prompt_class}): {told(kept)}")

    names = [PLAIN, *strategies]
    if any(
        name not in kept["answers"].get(p.id, {}) for p in prompts for name in names
    ):
        model = load_model(path, dtype=dtype, device="cpu")
        draft = None
        if draft_model is not None:
            draft = load_model(draft_model, dtype=dtype, device="cpu")
        for each in (model, draft):
            if each is not None:
                ReadOnce(each)
        engine = Engine(model, draft, guard=False)
        made = {name: host.create(name, {}) for name in names}
        greedy = Controls.for_model(model, temperature=0, max_new_tokens=tokens)

        def ours(name: str, ids: list[int]) -> list[int]:
            return engine.generate(made[name], ids, greedy).token_ids

        take(model, names, ours, count)
        del model, draft, engine, made
    done = all(PLAIN in kept["answers"].get(p.id, {}) for p in prompts[:generate])
    if done and is_open():
        untouched = load_model(path, dtype=dtype, device="cpu", accelerate=False)
        decode = theirs(untouched, None, host, HF, {})
        with torch.inference_mode():
            take(untouched, [HF], lambda _, ids: decode(ids, tokens)[0], generate)
    click.echo(told(kept))


def told(kept: dict[str, Any]) -> str:
    """How many of each contender's answers are plain decoding's."""
    parts = []
    for name, found in kept["verdicts"].items():
        kinds = Counter(each.partition(" ")[0] for each in found.values())
        ties, others = kinds["near_tie"], kinds["mismatch"]
        parts.append(
            f"{name} {kinds['identical']}/{len(found)}"
            + (f" (+{ties} near ties)" if ties else "")
            + (f" ({others} DIFFER)" if others else "")
        )
    return ", ".join(parts)


if __name__ == "__main__":
    main()
