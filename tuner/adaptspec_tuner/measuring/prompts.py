"""Which prompts can be measured: read by the model, with room, each counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from adaptspec.errors import AdaptSpecError, WorkloadError
from adaptspec.workloads import Prompt, Workload

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel

LEAST_NEW_TOKENS = 2  # the first is the prefill's: of one there is no speed
WAY_OUT = "mend it, or leave such lines out with --skip-bad (skip_bad=True)"


class Encodes(Protocol):
    """Knows how prompts are encoded for the model, and how long its outputs may be."""

    @property
    def most_tokens(self) -> int | None:
        """Of prompt and output together; None where the model doesn't say."""

    def ids(self, prompt: Prompt) -> Sequence[int]:
        """The prompt's token ids."""

    def length(self, prompt: Prompt) -> int:
        """New tokens that are asked for."""


def measurable(
    workload: Workload,
    model: Encodes,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Workload:
    """The prompts that are measured: each can be decoded, and no two are the same.

    Two prompts of a class are the same if their token ids are, or their texts but for
    white space. The first counts; were both measured, one prompt would be evidence
    twice, and perhaps be tuned on and held out as well.

    Args:
        limit: Most prompts of a class; those behind them aren't looked at.
        skip_bad: Leave out what can't be decoded, and say how many they were.

    Raises:
        WorkloadError: naming the first prompt that can't be decoded, or where none
            is left.
    """
    kept: list[Prompt] = []
    seen: set[tuple[str, object]] = set()
    counts: dict[str, int] = {}
    for note in workload.notes:
        warn(note)
    bad, copies, cut = list(workload.skipped), 0, 0
    for prompt in workload.prompts:
        name = prompt.prompt_class
        if limit is not None and counts.get(name, 0) >= limit:
            continue
        if (problem := _problem(prompt, model)) is not None:
            bad.append(f"{prompt.where or f'prompt {prompt.id!r}'}: {problem}")
            continue
        ids = tuple(model.ids(prompt))
        same: set[tuple[str, object]] = {(name, ids), (name, _words(prompt))}
        if same & seen:
            copies += 1
            continue
        seen |= same
        kept.append(prompt)
        counts[name] = counts.get(name, 0) + 1
        most = model.most_tokens
        cut += most is not None and len(ids) + model.length(prompt) > most
    if bad and not skip_bad:
        others = f" ({len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise WorkloadError(f"{bad[0]}{others}; {WAY_OUT}")
    if not kept:
        raise WorkloadError(
            f"no prompt of {workload.name} is left; the first: {bad[0]}"
        )
    if bad:
        warn(f"bad prompts left out: {len(bad)}; the first: {bad[0]}")
    if copies:
        warn(f"repeated prompts left out: {copies}; in a class each counts once")
    if cut:
        warn(
            f"prompts with room for fewer new tokens than asked for: {cut}; their "
            f"outputs end at the model's {model.most_tokens} tokens"
        )
    asked = Counter(prompt.prompt_class for prompt in workload.prompts)
    return replace(
        workload, prompts=tuple(kept), skipped=(), notes=(), of_class=dict(asked)
    )


def check_model(model: LanguageModel, ids: Sequence[int]) -> None:
    """Refuse a model whose logits ``[1, vocab]`` after ``ids`` say nothing.

    Raises:
        AdaptSpecError: naming the model, what is wrong and the way out.
    """
    logits = model.read_alone(ids).logits[-1]
    if not bool(logits.isfinite().any()) or bool(logits.isnan().any()):
        raise AdaptSpecError(
            f"{model.name} can't be tuned: after the first prompt its logits aren't "
            f"numbers in {str(model.dtype).removeprefix('torch.')}; mend its weights, "
            "or load it with --dtype float32"
        )


def _problem(prompt: Prompt, model: Encodes) -> str | None:
    """Why it can't be measured, None if it can."""
    texts = (
        [m.content for m in prompt.messages] if prompt.text is None else [prompt.text]
    )
    calls = any(message.more for message in prompt.messages)
    if not calls and not any(text.strip() for text in texts):
        return "it holds nothing but white space"
    try:
        count = len(model.ids(prompt))
    # A chat template is a program of the model's, and a tokenizer is another's code.
    except Exception as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        return f"it can't be encoded: {lines[0]}"
    most = model.most_tokens
    if most is not None and count + LEAST_NEW_TOKENS > most:
        return (
            f"prompt + {LEAST_NEW_TOKENS} <= {most} tokens must hold for the model, "
            f"got a prompt of {count}"
        )
    return None


def _words(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """Who says what, whatever the white space, and the tools that are at hand."""
    turns = (
        [
            (m.role + (str(dict(m.more)) if m.more else ""), m.content)
            for m in prompt.messages
        ]
        if prompt.text is None
        else [("", prompt.text)]
    )
    if prompt.tools:
        turns.append(("tools", str(prompt.tools)))
    return tuple((role, " ".join(text.split())) for role, text in turns)
