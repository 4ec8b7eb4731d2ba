"""Training data: prompts to be answered by the model itself, or whole conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.generation_fields import ONE_SEQUENCE
from adaptspec.errors import InvalidPromptError, WorkloadError
from adaptspec.model.language_model import LanguageModel
from adaptspec.workloads import Prompt, Workload, read_workload


@dataclass(frozen=True)
class Example:
    """A token sequence and which of its tokens are answers.

    Args:
        id: Unique in its data.
        tokens: The whole sequence, prompt included.
        spans: Half-open ranges of answer tokens, ascending; each begins at 1 or later.
    """

    id: str
    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def positions(self) -> list[int]:
        """Where the model stood before each answer token: features are wanted there."""
        return [p - 1 for start, end in self.spans for p in range(start, end)]

    def targets(self, ahead: int) -> list[int]:
        """The token ``ahead`` places after each position, -100 beyond its answer."""
        return [
            self.tokens[p + ahead] if p + ahead < end else -100
            for start, end in self.spans
            for p in range(start - 1, end - 1)
        ]


def read_data(path: Path, tell: Callable[[str], None] | None = None) -> Workload:
    """Prompts and conversations of a file, as a workload.

    All layouts that ``adaptspec tune`` takes; conversations may end with the
    assistant's answer.

    Args:
        tell: Gets a sentence about what was left out or not read.

    Raises:
        WorkloadError: naming file, line and what is wrong.
    """
    workload = read_workload(path, answers=True)
    if tell is not None:
        for note in workload.notes:
            tell(note)
    return workload


def with_answers(workload: Workload) -> bool:
    """Whether every conversation ends with the assistant's answer.

    Raises:
        WorkloadError: if only some do.
    """
    ended = [_is_answered(prompt) for prompt in workload.prompts]
    if any(ended) and not all(ended):
        first = workload.prompts[ended.index(False)].id
        raise WorkloadError(
            f"{workload.name}: either all conversations end with an assistant message "
            f"or none does, got {sum(ended)} of {len(ended)}, the first without is "
            f"{first!r}; pass --answers self to have all answered by the model"
        )
    return all(ended)


def without_answers(workload: Workload) -> Workload:
    """The same with the assistant's last messages taken off."""
    return replace(
        workload,
        prompts=tuple(
            replace(p, messages=p.messages[:-1]) if _is_answered(p) else p
            for p in workload.prompts
        ),
    )


def encode_conversation(
    model: LanguageModel, prompt: Prompt, max_length: int
) -> Example | None:
    """The conversation with every assistant turn marked as an answer.

    Sequences are cut at ``max_length`` tokens; None if no answer token is left.

    Raises:
        InvalidPromptError: if the chat template can't be told apart by turns.
    """
    messages = [message.as_dict() for message in prompt.messages]
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if all(earlier["role"] != "user" for earlier in messages[:at]):
            continue  # said to nobody
        # A turn of its own, also behind another of the assistant's.
        before = model.encode(
            messages[:at], template_arguments={"add_generation_prompt": True}
        )
        text = _rendered(model, messages[: at + 1])
        whole = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        if whole[: len(before)] != before or whole[: len(tokens)] != tokens:
            raise InvalidPromptError(
                f"{prompt.id}: the chat template of {model.name} renders a turn "
                "differently once others follow, so answers can't be marked; give "
                "conversations of one answer each, or use --answers self"
            )
        tokens = whole
        if (end := _trimmed(model, whole, len(before))) > len(before):
            spans.append((len(before), end))
    spans = [(s, min(e, max_length)) for s, e in spans if s < max_length and s > 0]
    if not spans:
        return None
    return Example(prompt.id, tuple(tokens[:max_length]), tuple(spans))


def _trimmed(model: LanguageModel, tokens: Sequence[int], start: int) -> int:
    """The end of the answer: after its end token, without what the template adds."""
    ends = Controls.for_model(model, **ONE_SEQUENCE).eos_token_ids
    for at in range(start, len(tokens)):
        if tokens[at] in ends:
            return at + 1
    return len(tokens)


def _rendered(model: LanguageModel, messages: Sequence[dict[str, Any]]) -> str:
    return str(model.tokenizer.apply_chat_template(list(messages), tokenize=False))


def _is_answered(prompt: Prompt) -> bool:
    return bool(prompt.messages) and prompt.messages[-1].role == "assistant"
