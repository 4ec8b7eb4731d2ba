"""Answers on disk with the hidden states at which they were given.

A folder of two files that only grow: ``features.bin``, rows of the model's own type,
and ``answers.jsonl``, one line per example and one after each finished batch. What a
killed process left behind its last finished batch is dropped at the next opening.
Whether features are kept is settled when the folder is made, and written in its first
line.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptspec.errors import TrainingError
from adaptspec_training.conversations import Example
from adaptspec_training.trainer import replace_file

ANSWERS, FEATURES = "answers.jsonl", "features.bin"
KEPT_FREE = 1 << 30  # bytes of the disk that are never filled


def keeps_features(folder: Path) -> bool | None:
    """Whether the answers in ``folder`` have features; None if there are no answers.

    Raises:
        TrainingError: if their file is damaged.
    """
    head = _head(folder / ANSWERS)
    return None if head is None else bool(head.get("features", True))


class Corpus:
    """Examples and their features ``[positions, hidden]``.

    Args:
        folder: Made if it isn't there.
        hidden_size: Width of a row; 0 keeps no features, and drops those there are.
        dtype: Of a row.
        fingerprint: What made the answers; another run's are refused.

    Raises:
        TrainingError: if the folder holds something else, or is damaged.
    """

    def __init__(
        self, folder: Path, hidden_size: int, dtype: torch.dtype, fingerprint: str
    ) -> None:
        self._folder, self._hidden, self._dtype = folder, hidden_size, dtype
        self.examples: list[Example] = []
        self.batches = 0
        self.seconds = 0.0  # that answering took, in all processes
        self._first: list[int] = []  # row of each example's first position
        self._rows = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._restore(fingerprint)
        self._view: torch.Tensor | None = None

    @property
    def positions(self) -> int:
        """Answer tokens in all."""
        return sum(len(example.positions) for example in self.examples)

    @property
    def has_features(self) -> bool:
        """Whether hidden states are kept."""
        return self._hidden > 0

    def append(
        self,
        examples: Sequence[Example],
        features: Sequence[torch.Tensor],
        seconds: float = 0.0,
    ) -> None:
        """Add a finished batch; a kill leaves all of it or nothing.

        Args:
            seconds: That it took.

        Raises:
            TrainingError: if the disk would be full.
        """
        self._view = None
        if self.has_features:
            rows = torch.cat([f.detach().cpu().to(self._dtype) for f in features])
            if len(rows) != sum(len(e.positions) for e in examples):
                raise ValueError("one feature row per position is needed")
            free = shutil.disk_usage(self._folder).free - KEPT_FREE
            if rows.nbytes > free:
                raise TrainingError(
                    f"{self._folder} needs {rows.nbytes / 2**20:.0f} MiB more for "
                    "hidden states and the disk has none to spare; free some, choose "
                    "another --out, or pass --features recompute"
                )
            with (self._folder / FEATURES).open("ab") as file:
                file.write(rows.contiguous().view(torch.uint8).numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
        lines = []
        for example in examples:
            self._take(example)
            lines.append(
                {"id": example.id, "tokens": example.tokens, "spans": example.spans}
            )
        self.batches += 1
        self.seconds += seconds
        end = {"batch": self.batches, "rows": self._rows, "seconds": seconds}
        with (self._folder / ANSWERS).open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in [*lines, end]))
            file.flush()
            os.fsync(file.fileno())

    def hidden(self, index: int) -> torch.Tensor:
        """Features ``[positions, hidden]`` of an example; a view of the file."""
        if self._view is None:
            path = self._folder / FEATURES
            flat = torch.from_file(
                str(path), size=self._rows * self._hidden, dtype=self._dtype
            )
            self._view = flat.view(self._rows, self._hidden)
        first = self._first[index]
        return self._view[first : first + len(self.examples[index].positions)]

    def _take(self, example: Example) -> None:
        self.examples.append(example)
        self._first.append(self._rows)
        self._rows += len(example.positions)

    def _restore(self, fingerprint: str) -> None:
        path = self._folder / ANSWERS
        head = _head(path)
        kept = {"made by": fingerprint, "features": self.has_features}
        if head is None:
            (self._folder / FEATURES).unlink(missing_ok=True)
            replace_file(path, _line(kept))
            return
        if head["made by"] != fingerprint:
            raise TrainingError(
                f"{self._folder} holds answers made with other options or data; "
                "choose another --out, or pass --fresh to drop them"
            )
        content = path.read_bytes()
        lines = content.split(b"\n")[:-1]  # what follows the last line end is cut off
        good = size = len(lines[0]) + 1
        waiting: list[Example] = []
        try:
            for line in lines[1:]:
                size += len(line) + 1
                row = json.loads(line)
                if "batch" not in row:
                    spans = tuple((int(s), int(e)) for s, e in row["spans"])
                    waiting.append(Example(row["id"], tuple(row["tokens"]), spans))
                    continue
                for example in waiting:
                    self._take(example)
                waiting, good, self.batches = [], size, int(row["batch"])
                self.seconds += float(row["seconds"])
                if self._rows != row["rows"]:
                    raise ValueError(f"batch {self.batches} counts other rows")
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        if good < len(content):
            os.truncate(path, good)
        if not self.has_features and head.get("features", True):
            # The line goes first: a kill leaves features that nobody looks for.
            rest = path.read_bytes()[len(lines[0]) + 1 :]
            replace_file(path, _line(kept) + rest)
            (self._folder / FEATURES).unlink(missing_ok=True)
        elif self.has_features and not head.get("features", True):
            raise TrainingError(
                f"{self._folder} holds answers without hidden states; leave out "
                "--features store, or pass --fresh to have the answers made again"
            )
        self._trim_features()

    def _trim_features(self) -> None:
        if not self.has_features or not self._rows:
            return
        path = self._folder / FEATURES
        expected = self._rows * self._hidden * self._dtype.itemsize
        found = path.stat().st_size if path.exists() else 0
        if found < expected:
            raise TrainingError(
                f"{path} must hold {expected} bytes for {self._rows} answer tokens, "
                f"got {found}; remove the folder or pass --fresh"
            )
        os.truncate(path, expected)


def _head(path: Path) -> dict[str, Any] | None:
    """The first line, None if there is no file."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
        if not isinstance(head, dict) or "made by" not in head:
            raise ValueError("its first line doesn't say what made it")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return head


def _line(head: Mapping[str, Any]) -> bytes:
    return (json.dumps(head) + "\n").encode()


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{path} is damaged ({error}); remove the folder or pass --fresh"
    )
