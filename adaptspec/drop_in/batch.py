"""Decode the rows of a batch in step, each with its own drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from adaptspec.decoding.prepared import Recorded
from adaptspec.drop_in.by_row import Endings
from adaptspec.drop_in.noise import Noise
from adaptspec.drop_in.streamers import ReaderGone
from adaptspec.model.language_model import LanguageModel
from adaptspec.streaming.stream import Result, Stream

Emit = Callable[[torch.Tensor], None]


class RowDecoding:
    """One row: its stream, read token by token, and what is recorded of it."""

    def __init__(self, stream: Stream, recorded: Recorded) -> None:
        self.stream, self.recorded = stream, recorded
        self._waiting: list[int] = []
        self.read: list[int] = []
        self._stopped = False

    def step(self) -> list[int]:
        """All tokens of the next step; none where the row has ended."""
        tokens = self.stream.next_tokens()
        self.read += tokens
        return tokens

    def token(self) -> int:
        """The next token. There must be one: see :attr:`ended`."""
        while not self._waiting:
            self._waiting = self.stream.next_tokens()
        self.read.append(self._waiting.pop(0))
        return self.read[-1]

    @property
    def ended(self) -> bool:
        """Whether its last token was read."""
        return not self._waiting and self.stream.ended

    def stop(self) -> None:
        """End it at the last token read, and forget what was decoded beyond."""
        self._stopped |= not self.ended
        self._waiting = []
        self.stream.close()
        for kept in (self.recorded.scores, self.recorded.logits):
            del kept[len(self.read) :]

    def result(self, target: LanguageModel) -> Result:
        """What came of it, without tokens that nobody read."""
        result = self.stream.result
        if not self._stopped:
            return result
        text = target.decode(self.read)
        return replace(result, token_ids=self.read, text=text, finish="stop")


def decode_row(row: RowDecoding, noise: Noise | None, emit: Emit) -> list[list[int]]:
    """A batch of one: tokens are emitted as many at a time as are accepted."""
    while accepted := row.step():
        if noise is not None:
            noise.forget(len(row.read))
        try:
            emit(torch.tensor(accepted))
        except ReaderGone:
            break
    return [row.read]


def decode_rows(
    rows: Sequence[RowDecoding],
    endings: Endings,
    pad: int | None,
    input_ids: torch.Tensor,
    noise: Noise | None,
    emit: Emit,
) -> list[list[int]]:
    """Several rows: at each step every row emits one token, drafted or not.

    Args:
        pad: Id behind rows that have ended.
        input_ids: The prompts ``[rows, length]``, which shared criteria see.

    Returns:
        New tokens of each row, all of one length.
    """
    emitted: list[list[int]] = [[] for _ in rows]
    unfinished = [True] * len(rows)
    text, scores = input_ids, Scores(rows)
    while any(unfinished):
        for number, row in enumerate(rows):
            padded = row.ended or (endings.pads and not unfinished[number])
            emitted[number].append((pad or 0) if padded else row.token())
        latest = torch.tensor([tokens[-1] for tokens in emitted])
        emit(latest)
        steps = len(emitted[0])
        for number, row in enumerate(rows):
            unfinished[number] &= not row.ended
        if endings.shared:
            text = torch.cat([text, latest[:, None].to(text.device)], -1)
            seen = scores.until(steps)
            for criterion in endings.shared:
                ends = torch.as_tensor(criterion(text, seen)).expand(len(rows)).tolist()
                unfinished = [
                    left and not end for left, end in zip(unfinished, ends, strict=True)
                ]
        if endings.pads or not any(unfinished):
            for number, row in enumerate(rows):
                if not unfinished[number]:
                    row.stop()
        if noise is not None:
            noise.forget(steps)
    return emitted


class Scores:
    """What is recorded of rows, put together step by step as ``generate`` returns it.

    A row that has ended has zeros.
    """

    def __init__(self, rows: Sequence[RowDecoding]) -> None:
        self._recorded = [row.recorded for row in rows]
        self._steps: list[torch.Tensor] = []

    def until(self, steps: int) -> tuple[torch.Tensor, ...] | None:
        """Scores ``[rows, vocab]`` of the first steps, None if they aren't kept."""
        if not self._recorded[0].keep_scores:
            return None
        for step in range(len(self._steps), steps):
            self._steps.append(
                _of_step([recorded.scores for recorded in self._recorded], step)
            )
        return tuple(self._steps[:steps])


def stacked(rows: Sequence[Sequence[torch.Tensor]], steps: int) -> tuple[Any, ...]:
    """Tensors ``[1, vocab]`` of rows and steps as one ``[rows, vocab]`` a step."""
    return tuple(_of_step(rows, step) for step in range(steps))


def _of_step(rows: Sequence[Sequence[torch.Tensor]], step: int) -> torch.Tensor:
    longest = max(rows, key=len)
    empty = torch.zeros_like(longest[step])
    return torch.cat([row[step] if step < len(row) else empty for row in rows])
