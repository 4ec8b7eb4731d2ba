"""The target's states and likeliest tokens of a recorded text, read in one forward.

Greedy decoding would have shown the same, position by position, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from adaptspec.model.language_model import LanguageModel
from adaptspec_tuner.measuring.profiler import Recording


@dataclass(frozen=True)
class RecordedOutputs:
    """States and likeliest tokens at the positions from ``first`` on.

    Args:
        first: Index into prompt and tokens.
        hidden: Layer -> ``[positions, hidden]``.
        tops: Likeliest tokens ``[positions, k]``, descending; empty if not asked for.
        logits: Theirs, of the same shape.
    """

    first: int
    hidden: Mapping[int, torch.Tensor] = field(default_factory=dict)
    tops: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def without_logits(self) -> RecordedOutputs:
        """For a drafter that reads none; rows of the vocabulary's width take time."""
        return RecordedOutputs(self.first, self.hidden)

    def states(self, places: Sequence[int | None]) -> dict[int, torch.Tensor]:
        """Layer -> a row for each place in the text; zeros where it is None."""
        found = {}
        for layer, states in self.hidden.items():
            rows = states.new_zeros(len(places), states.shape[1])
            for row, place in enumerate(places):
                if place is not None:
                    rows[row] = states[place - self.first]
            found[layer] = rows
        return found

    def logits_of(self, places: Sequence[int], vocab_size: int) -> torch.Tensor:
        """Logits ``[places, vocab]``, of which only the highest are known."""
        rows = [place - self.first for place in places]
        logits = self.logits[rows]
        lowest = torch.finfo(logits.dtype).min
        padded = logits.new_full((len(rows), vocab_size), lowest)
        return padded.scatter_(1, self.tops[rows], logits)


@torch.inference_mode()
def read(
    model: LanguageModel,
    recording: Recording,
    *,
    hidden_layers: Sequence[int] = (),
    prompt_positions: int = 1,
    tops: int = 0,
) -> RecordedOutputs:
    """Run ``model`` over prompt and tokens, once.

    Args:
        prompt_positions: How many of the prompt's last positions are kept, too.
        tops: Logits kept of each position.
    """
    # Nothing comes after the last token, so nobody asks what the target thought there.
    text = [*recording.prompt, *recording.tokens[:-1]]
    first = max(0, len(recording.prompt) - max(1, prompt_positions))
    forward = model.prefill(
        text,
        model.new_cache(len(text)),
        last=len(text) - first if tops else 1,
        hidden_layers=hidden_layers,
    )
    hidden = {layer: h[first:].clone() for layer, h in forward.hidden.items()}
    if not tops:
        return RecordedOutputs(first, hidden)
    logits, tokens = forward.logits.topk(min(tops, model.vocab_size))
    return RecordedOutputs(first, hidden, tokens, logits)
