"""The random numbers that ``generate`` samples with, in its order.

``torch.multinomial`` draws one exponential number per row and token of the vocabulary
from torch's generator, and takes the token with the largest ratio of probability and
number. The same numbers, drawn in the same order, pick the same tokens here, although
a draft may ask about a later place first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch


class Noise:
    """The numbers of each step of a batch, drawn from torch's own generator.

    Args:
        rows: Rows of the batch.
        device: Where probabilities are; its generator is drawn from.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._vocab = 0  # what a row of the target's probabilities has
        self._numbers: dict[int, torch.Tensor] = {}  # step -> [rows, vocab]
        self._states: dict[int, torch.Tensor] = {}  # before the step was drawn
        self._drawn = 0
        self._left = self._state()  # by the last draw

    def seed(self) -> int:
        """A seed for other noise, settled by the generator, which isn't moved on."""
        data = self._left.numpy().tobytes()
        return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")

    def pick(self, probs: torch.Tensor, step: int, row: int) -> int:
        """The id that ``generate`` samples from ``probs [vocab]`` at a step.

        The target asks first. A draft's ``probs`` may be shorter or longer.
        """
        self._vocab = self._vocab or len(probs)
        numbers = self._at(step)[row]
        size = min(len(probs), len(numbers))
        ratios = probs[:size].to(numbers) / numbers[:size]
        return int(ratios.argmax())

    def of_row(self, row: int, prompt: int) -> Callable[[torch.Tensor, int], int]:
        """The same for one row: of probabilities and a place in the row's own ids.

        Args:
            prompt: Ids of its prompt.
        """
        return lambda probs, place: self.pick(probs, place - prompt, row)

    def forget(self, steps: int) -> None:
        """Let go of what the first ``steps`` needed."""
        for step in [s for s in self._numbers if s < steps]:
            del self._numbers[step], self._states[step]

    def rewind(self, steps: int) -> None:
        """Leave the generator as ``generate`` leaves it after so many steps.

        Where someone else has drawn from it since, it stays as it is.
        """
        state = self._states.get(steps)
        if state is not None and torch.equal(self._left, self._state()):
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(state, self._device)
            else:
                torch.set_rng_state(state)

    def _at(self, step: int) -> torch.Tensor:
        while self._drawn <= step:
            self._states[self._drawn] = self._state()
            shape = self._rows, self._vocab
            numbers = torch.empty(shape, dtype=torch.float32, device=self._device)
            self._numbers[self._drawn] = numbers.exponential_(1)
            self._drawn += 1
            self._left = self._state()
        return self._numbers[step]

    def _state(self) -> torch.Tensor:
        if self._device.type == "cuda":
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()
