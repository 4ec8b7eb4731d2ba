"""Training Medusa's heads (arXiv:2401.10774): their loss, measures and tree.

Medusa-1, section 2.2.1: the target is frozen, ``sum_k decay^k CE_k`` over heads k.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from adaptspec.heads.medusa import MedusaHeads
from adaptspec_training.conversations import Example
from adaptspec_training.trainer import Batch, Losses, Trainee

IGNORED = -100
DECAY = 0.8  # of the loss from head to head; arXiv:2401.10774, section 2.2.1
# How far ahead of its hidden state the first head looks: the LM head guesses the next
# token, the first head the one after it.
AHEAD = 2
RANKS = 10  # ranks told apart when measuring; the reference's trees use as many
PATHS = 256  # of the calibrated tree
# Features [positions, hidden] of an example, by its index in the corpus.
Features = Callable[[int, Example], torch.Tensor]


class HeadsTrainee(Trainee):
    """Heads over a frozen target.

    Args:
        heads: Trained in place, in float32.
        features: Where hidden states come from.
        vocab_size: Of the target.
        lm_head: The target's, for heads without outputs of their own.
        decay: Weight of a head's loss against the one before.
        factor: Of the heads' learning rate.
        chunk: Positions whose logits are held at once.
        autocast: Type of the products, None for the weights' own.
    """

    kind: ClassVar[str] = "medusa"

    def __init__(
        self,
        heads: MedusaHeads,
        features: Features,
        vocab_size: int,
        *,
        lm_head: nn.Module | None = None,
        decay: float = DECAY,
        factor: float = 4.0,
        chunk: int = 1024,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.heads = heads
        self._features, self._lm_head = features, lm_head
        self._decay, self._factor, self._chunk = decay, factor, chunk
        self._autocast = autocast
        self._device = heads.blocks[0][0].linear.weight.device  # type: ignore[index]
        # Target's token -> the heads' own number of it, or none.
        self._numbers = torch.full((vocab_size + 1,), IGNORED, device=self._device)
        known = heads.token_map
        tokens = torch.arange(heads.draft_vocab) if known is None else known.cpu()
        self._numbers[tokens.to(self._device)] = torch.arange(
            heads.draft_vocab, device=self._device
        )

    @property
    def count(self) -> int:
        """How many heads."""
        return len(self.heads.blocks)

    def modules(self) -> Mapping[str, nn.Module]:
        """The heads."""
        return {"heads": self.heads}

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """All weights and biases of the heads, at their factor."""
        return [(list(self.heads.parameters()), self._factor)]

    def backward(self, batch: Batch, progress: float) -> Losses:
        """The mean loss of each head over its targets, summed with decaying weights."""
        hidden = self.gather(batch)
        return self.backward_heads(hidden, self.targets(batch), 1.0)

    def gather(self, batch: Batch) -> torch.Tensor:
        """Features of all positions ``[positions, hidden]``."""
        pairs = zip(batch.indices, batch.examples, strict=True)
        rows = torch.cat([self._features(index, example) for index, example in pairs])
        return rows.to(self._device, torch.float32)

    def targets(self, batch: Batch) -> torch.Tensor:
        """``[heads, positions]``: the heads' numbers of what is right, or -100."""
        rows = [
            [t for example in batch.examples for t in example.targets(head + AHEAD)]
            for head in range(self.count)
        ]
        tokens = torch.tensor(rows, device=self._device)
        # The last entry stands for what isn't a token.
        return self._numbers[tokens.where(tokens >= 0, len(self._numbers) - 1)]

    def backward_heads(
        self, hidden: torch.Tensor, targets: torch.Tensor, weight: float
    ) -> Losses:
        """Gradients of ``weight`` times the heads' loss, to them and to ``hidden``.

        Logits of few positions at a time are held, so memory doesn't grow with a batch.
        """
        counts = (targets != IGNORED).sum(1).clamp_min(1)
        weights = [weight * self._decay ** (head + 1) for head in range(self.count)]
        sums = torch.zeros(self.count)
        for start in range(0, hidden.shape[0], self._chunk):
            some = slice(start, start + self._chunk)
            with self.casting():
                logits = self.heads(hidden[some], self._lm_head)
            losses = torch.stack(
                [
                    functional.cross_entropy(
                        logits[head].float(),
                        targets[head, some],
                        ignore_index=IGNORED,
                        reduction="sum",
                    )
                    / counts[head]
                    for head in range(self.count)
                ]
            )
            total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
            total.backward()
            sums += losses.detach().cpu()
        parts = {f"loss_head_{i + 1}": float(sums[i]) for i in range(self.count)}
        mean = sum(w * float(s) for w, s in zip(weights, sums, strict=True))
        return Losses(mean, parts)

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """How often the right token is a head's first, or among its first five."""
        return {"heads": accuracies(self.ranks(batches))}

    def ranks(self, batches: Sequence[Batch]) -> torch.Tensor:
        """``[heads, positions]``: the rank of what is right, as :meth:`ranks_at`."""
        found = [self.ranks_at(self.gather(batch), batch) for batch in batches]
        return torch.cat(found, 1)

    @torch.no_grad()
    def ranks_at(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """``[heads, positions]``: the rank, from 0, of what is right after ``hidden``.

        ``MISSED`` where the heads don't know the token, ``NOT_JUDGED`` beyond the
        answer's end.
        """
        targets = self.targets(batch)
        beyond = torch.tensor(
            [
                [
                    t < 0
                    for example in batch.examples
                    for t in example.targets(head + AHEAD)
                ]
                for head in range(self.count)
            ],
            device=self._device,
        )
        found = []
        for start in range(0, hidden.shape[0], self._chunk):
            some = slice(start, start + self._chunk)
            with self.casting():
                logits = self.heads(hidden[some], self._lm_head)
            right = targets[:, some].clamp_min(0)[..., None]
            found.append((logits > logits.gather(-1, right)).sum(-1))
        ranks = torch.cat(found, 1)
        ranks[targets == IGNORED] = MISSED
        ranks[beyond] = NOT_JUDGED
        return ranks.cpu()

    def casting(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, products are computed in the type asked for."""
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast)


MISSED, NOT_JUDGED = -1, -2


def accuracies(ranks: torch.Tensor) -> list[dict[str, Any]]:
    """Per head: how often its first guess, and one of its first five, is right."""
    found = []
    for row in ranks:
        judged = row[row != NOT_JUDGED]
        total = max(1, len(judged))
        found.append(
            {
                "top1": float((judged == 0).sum()) / total,
                "top5": float(((judged >= 0) & (judged < 5)).sum()) / total,
                "positions": len(judged),
            }
        )
    return found


def rank_shares(ranks: torch.Tensor, most: int) -> list[list[float]]:
    """How often each of a head's first ``most`` ranks is right; ``[heads][most]``."""
    shares = []
    for row in ranks:
        judged = row[row != NOT_JUDGED]
        counts = [int((judged == rank).sum()) for rank in range(most)]
        shares.append([count / max(1, len(judged)) for count in counts])
    return shares


def rank_paths(
    ranks: torch.Tensor, most_ranks: int, most_paths: int
) -> list[tuple[tuple[int, ...], float]]:
    """Rank paths with the share of positions at which all of the path was right.

    Counted together, since heads are right at the same places: the product of their
    own shares, by which the reference builds its trees, is far too low for deep paths.

    Returns:
        Best first; each path's beginnings stand before it.
    """
    found: list[tuple[tuple[int, ...], float]] = []
    columns = ranks.T.tolist()
    for depth in range(1, len(ranks) + 1):
        judged = [row[:depth] for row in columns if NOT_JUDGED not in row[:depth]]
        counts = Counter(
            tuple(row) for row in judged if all(0 <= rank < most_ranks for rank in row)
        )
        found += [(path, count / len(judged)) for path, count in counts.items()]
    shares = dict(found)
    # A longer path was judged at fewer positions, near none of the ends of answers.
    for path, share in sorted(found, key=lambda pair: len(pair[0])):
        if len(path) > 1:
            shares[path] = min(share, shares[path[:-1]])
    order = sorted(shares, key=lambda path: (-shares[path], len(path), path))
    return [(path, shares[path]) for path in order[:most_paths]]


def draft_vocabulary(
    examples: Sequence[Example], size: int, vocab_size: int
) -> list[int]:
    """The ``size`` tokens that answers hold most often, ascending.

    Where answers hold fewer, prompts' tokens and then the lowest ids fill it up.
    """
    answered: Counter[int] = Counter()
    asked: Counter[int] = Counter()
    for example in examples:
        asked.update(example.tokens)
        for start, end in example.spans:
            answered.update(example.tokens[start:end])
    chosen = [t for t, _ in sorted(answered.items(), key=lambda i: (-i[1], i[0]))]
    more = sorted(asked.items(), key=lambda i: (-i[1], i[0]))
    chosen += [token for token, _ in more if token not in answered]
    known = set(chosen)
    chosen += [t for t in range(vocab_size) if t not in known][: max(0, size)]
    return sorted(chosen[:size])
