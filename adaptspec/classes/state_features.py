"""Features of a prompt from the hidden states that reading it leaves behind.

Every strategy needs the target's prefill, so that its states cost nothing but being
looked at. What `tune --class-features states` learnt of them is kept as plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any

from adaptspec.errors import AdaptSpecError

if TYPE_CHECKING:
    import torch

    from adaptspec.model.language_model import LanguageModel

POOLING = "mean of unit rows"  # another way to pool needs another name
REST = "rest"


def states_layer(model: LanguageModel) -> int:
    """Which hidden states are looked at: the middle ones, of 0 (embeddings) to layers.

    What a text is about is read best from the middle of a model; its last states are
    about the next token (Skean and others 2025, Layer by Layer, arXiv:2502.02013).
    """
    return max(1, int(model.config.num_hidden_layers) // 2)


def pooled(states: torch.Tensor) -> list[float]:
    """One row of ``states [positions, hidden]``: the mean of them all.

    Each is divided by its root mean square first, as the next layer's norm does it, or
    the few positions of huge states, a prompt's first one mostly, were all there is.
    """
    rows = states.float()
    size = rows.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return [float(value) for value in (rows / size).mean(0).tolist()]


@dataclass(frozen=True)
class StateFeatures:
    """A few numbers of a pooled state: where it lies along the main directions of those
    that were tuned on, and how far off these.

    Args:
        layer: Index into the model's hidden states.
        mean: Of the pooled states, ``[hidden]``.
        scale: Their standard deviations, ``[hidden]``.
        directions: Orthonormal rows ``[components][hidden]``, of what is standardised.
    """

    layer: int
    mean: Sequence[float]
    scale: Sequence[float]
    directions: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        width = len(self.mean)
        values = [*self.mean, *self.scale, *(v for row in self.directions for v in row)]
        if (
            self.layer < 0
            or not width
            or len(self.scale) != width
            or not self.directions
            or any(len(row) != width for row in self.directions)
            or not all(math.isfinite(value) for value in values)
            or not all(value > 0 for value in self.scale)
        ):
            raise AdaptSpecError(
                "features of states need a layer, finite means, positive scales and "
                "directions, each as wide as the states"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What the features are called."""
        return (*(f"state {i + 1}" for i in range(len(self.directions))), REST)

    def __call__(self, state: Sequence[float]) -> list[float]:
        """The features of a pooled state; the last is what the directions leave of it,
        as a root mean square."""
        import torch

        mean, scale, directions = self._tensors
        found = (torch.tensor(list(state), dtype=torch.float64) - mean) / scale
        along = directions @ found
        left = float(found.square().sum() - along.square().sum())
        return [*along.tolist(), math.sqrt(max(0.0, left) / len(self.mean))]

    def misfit(self, model: LanguageModel) -> str | None:
        """Why a model's states aren't those that these were learnt from, or None."""
        width = int(model.config.hidden_size)
        layers = int(model.config.num_hidden_layers)
        if (len(self.mean), self.layer <= layers) == (width, True):
            return None
        return (
            f"states of {len(self.mean)} numbers at layer {self.layer} are expected, "
            f"{model.name} has {width} at {layers} layers; run tune again"
        )

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {
            "pooling": POOLING,
            "layer": self.layer,
            "mean": list(self.mean),
            "scale": list(self.scale),
            "directions": [list(row) for row in self.directions],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StateFeatures:
        """The features that a record holds.

        Raises:
            AdaptSpecError: if it holds none, or another version's.
        """
        try:
            if record["pooling"] != POOLING:
                raise AdaptSpecError(
                    "the stored classifier is another version's: its states are pooled "
                    f"as {record['pooling']!r}; run tune again"
                )
            return cls(
                index(record["layer"]),
                [float(value) for value in record["mean"]],
                [float(value) for value in record["scale"]],
                [[float(value) for value in row] for row in record["directions"]],
            )
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise AdaptSpecError(
                f"not a stored classifier's features of states: {error!r}"
            ) from None

    @cached_property
    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        mean, scale, directions = (
            torch.tensor(values, dtype=torch.float64)
            for values in (self.mean, self.scale, self.directions)
        )
        return mean, scale, directions
