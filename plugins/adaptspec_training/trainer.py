"""The loop that trains a drafter: batches, schedule, checkpoints, evaluation, log.

It knows nothing of heads: what is trained, its loss and its measures come from a
:class:`Trainee`. A killed run continues with the step after its last checkpoint, and
ends with the weights that an unbroken run ends with.
"""

from __future__ import annotations

import json
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from adaptspec.errors import TrainingError
from adaptspec_training.conversations import Example

LOG, STATE = "training.jsonl", "training.pt"


@dataclass(frozen=True)
class Batch:
    """Examples trained on together.

    Args:
        examples: Their tokens and answers.
        indices: Their places in the corpus, by which features are found.
    """

    examples: Sequence[Example]
    indices: Sequence[int]

    @property
    def positions(self) -> int:
        """Answer tokens."""
        return sum(len(example.positions) for example in self.examples)


@dataclass(frozen=True)
class Losses:
    """What a backward pass saw.

    Args:
        total: What is minimised: a mean over the batch.
        parts: Named losses for the log.
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Trainee(ABC):
    """A drafter under training: its weights, its loss, its measures.

    Class attributes:
        kind: What its files call it.
        lowers_memory: The options that do, for people whose memory ran out.
    """

    kind: ClassVar[str]
    lowers_memory: ClassVar[str] = "--batch-tokens or --chunk"

    @abstractmethod
    def modules(self) -> Mapping[str, nn.Module]:
        """Name -> module whose trained weights are stored in checkpoints."""

    @abstractmethod
    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """Trained parameters, each group with the factor of its learning rate."""

    @abstractmethod
    def backward(self, batch: Batch, progress: float) -> Losses:
        """Add the gradients of the batch's mean loss; ``progress`` is in 0..1."""

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Measures on text not trained on; JSON-ready."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Args:
        epochs: Passes over the training examples.
        learning_rate: At its peak, for groups of factor 1.
        warmup_steps: Steps of linear rise; the rest falls along a cosine to 0.
        batch_tokens: Answer tokens of a step, at least.
        weight_decay: AdamW's.
        clip: Largest norm of the gradients.
        seed: Of the order of examples and of what modules draw.
        evaluations: How often, evenly, the held-out part is measured.
        save_seconds: Between checkpoints.
    """

    epochs: int = 2
    learning_rate: float = 5e-4
    warmup_steps: int = 40
    batch_tokens: int = 4096
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    evaluations: int = 10
    save_seconds: float = 60.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, among ``steps``."""
        warmup = min(self.warmup_steps, max(1, steps // 10))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_batches(
    examples: Sequence[Example], indices: Sequence[int], schedule: Schedule, epoch: int
) -> list[Batch]:
    """The epoch's batches: all of ``indices`` in an order drawn from the seed."""
    order = list(indices)
    random.Random(f"{schedule.seed}:{epoch}").shuffle(order)
    return in_batches(examples, order, schedule.batch_tokens)


def in_batches(
    examples: Sequence[Example], order: Sequence[int], tokens: int
) -> list[Batch]:
    """Batches of at least ``tokens`` answer tokens, the last one of what is left."""
    batches: list[Batch] = []
    waiting: list[int] = []
    count = 0
    for index in order:
        waiting.append(index)
        count += len(examples[index].positions)
        if count >= tokens:
            batches.append(Batch([examples[i] for i in waiting], waiting))
            waiting, count = [], 0
    if waiting:
        batches.append(Batch([examples[i] for i in waiting], waiting))
    return batches


class Trainer:
    """Trains one trainee in one folder.

    Args:
        trainee: What is trained.
        examples: Of the whole corpus.
        train: Indices trained on.
        held_out: Indices measured on.
        folder: Where the log and the state are kept.
        fingerprint: What decides the result; each has a state of its own.
        device: Where the trainee's modules are, for the random state.
        clock: Seconds.
        tell: Gets each step's number, their count, loss and seconds left.
        stage: Told in log and state, where a run has several.
    """

    def __init__(
        self,
        trainee: Trainee,
        examples: Sequence[Example],
        train: Sequence[int],
        held_out: Sequence[int],
        schedule: Schedule,
        folder: Path,
        *,
        fingerprint: str,
        device: torch.device,
        clock: Callable[[], float],
        tell: Callable[[int, int, float, float], None],
        stage: str = "heads",
    ) -> None:
        if not train or not held_out:
            raise TrainingError(
                "training needs an example to train on and one to measure on, got "
                f"{len(train)} and {len(held_out)}; give more prompts"
            )
        self._trainee, self._examples = trainee, examples
        self._train, self._schedule = train, schedule
        self._held_out = in_batches(examples, held_out, schedule.batch_tokens)
        self._folder, self._stage = folder, stage
        self._fingerprint = f"{stage}:{fingerprint}"
        self._device = device
        self._clock, self._tell = clock, tell
        self._seconds = 0.0  # of earlier processes
        self._state = folder / f"{stage}-{fingerprint}-{STATE}"

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from the last checkpoint if there is one; the log.

        Raises:
            TrainingError: if the loss stops being a number, or memory or the disk
                runs out.
        """
        with out_of_memory(self._trainee.lowers_memory):
            return self._run()

    def _run(self) -> list[dict[str, Any]]:
        schedule = self._schedule
        torch.manual_seed(schedule.seed)
        optimizer = torch.optim.AdamW(
            [
                {"params": list(parameters), "factor": factor}
                for parameters, factor in self._trainee.groups()
            ],
            lr=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
        )
        epochs = [
            make_batches(self._examples, self._train, schedule, epoch)
            for epoch in range(schedule.epochs)
        ]
        batches = [batch for epoch in epochs for batch in epoch]
        steps = len(batches)
        measured = {
            round(steps * i / schedule.evaluations)
            for i in range(1, schedule.evaluations + 1)
        }
        done, log = self._restore(optimizer)
        began = saved = self._clock()
        if not log:
            log.append(self._measure(0, None))
            self._write(log)
        for step in range(done, steps):
            rate = schedule.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.zero_grad(set_to_none=True)
            losses = self._backward(batches[step], step, steps)
            parameters = [p for g in optimizer.param_groups for p in g["params"]]
            nn.utils.clip_grad_norm_(parameters, schedule.clip)
            optimizer.step()
            now = self._clock()
            left = (now - began) / (step + 1 - done) * (steps - step - 1)
            self._tell(step + 1, steps, losses.total, left)
            if step + 1 in measured:
                entry = self._measure(step + 1, losses)
                entry["seconds"] = self._seconds + self._clock() - began
                entry["rate"] = rate
                log.append(entry)
                self._write(log)
            if self._clock() - saved >= schedule.save_seconds or step + 1 == steps:
                self._save(step + 1, optimizer, log, self._clock() - began)
                saved = self._clock()
        for other in self._folder.glob(f"{self._stage}-*-{STATE}"):
            if other != self._state:
                other.unlink()
        return log

    def _backward(self, batch: Batch, step: int, steps: int) -> Losses:
        losses = self._trainee.backward(batch, step / steps)
        if not math.isfinite(losses.total):
            raise TrainingError(
                f"the loss became {losses.total} at step {step + 1}; lower --lr, or "
                "look at the data; the last checkpoint is kept"
            )
        return losses

    def _measure(self, step: int, losses: Losses | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"stage": self._stage, "step": step}
        if losses is not None:
            entry["loss"] = losses.total
            entry.update(losses.parts)
        entry.update(self._trainee.evaluate(self._held_out))
        return entry

    def _write(self, log: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in log)
        replace_file(self._folder / f"{self._stage}-{LOG}", text.encode())

    def _save(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        log: Sequence[Mapping[str, Any]],
        seconds: float,
    ) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "step": step,
            "seconds": self._seconds + seconds,
            "modules": {
                name: trained_state(module)
                for name, module in self._trainee.modules().items()
            },
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "log": json.dumps(list(log)),
        }
        if self._device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self._device)
        partial = self._state.with_suffix(".partial")
        try:
            torch.save(state, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self._state)
        except (OSError, RuntimeError) as error:  # torch's own file writer raises these
            partial.unlink(missing_ok=True)
            first = (str(error).splitlines() or [repr(error)])[0]
            raise TrainingError(
                f"can't write {self._state}: {first}; make room on the disk, and the "
                "same command continues from the checkpoint before"
            ) from error

    def _restore(
        self, optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[dict[str, Any]]]:
        """Steps done and the log up to there."""
        if not self._state.exists():
            return 0, []
        try:
            state = torch.load(self._state, map_location="cpu", weights_only=True)
            found = state["fingerprint"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise TrainingError(
                f"{self._state} can't be read ({type(error).__name__}); remove it to "
                "train from the start, or pass --fresh"
            ) from error
        if found != self._fingerprint:
            raise TrainingError(
                f"{self._state} is of a run with other options or data; choose "
                "another --out, or pass --fresh to drop it"
            )
        for name, module in self._trainee.modules().items():
            load_trained(module, state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self._device)
        self._seconds = float(state["seconds"])
        return int(state["step"]), json.loads(state["log"])


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that training changes, by name."""
    return {
        name: parameter.detach().cpu()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def load_trained(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what :func:`trained_state` gave."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


@contextmanager
def out_of_memory(options: str) -> Iterator[None]:
    """Inside, running out of memory says which options lower it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"memory ran out; lower {options}, or use a smaller model; the same "
            "command then continues"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: CUDA's, the CPU's or Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "not enough memory" in text or "can't allocate memory" in text


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
