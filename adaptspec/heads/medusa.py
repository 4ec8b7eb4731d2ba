"""Medusa's heads: small networks that guess tokens further ahead than the next.

Cai et al. 2024, arXiv:2401.10774. Head k (from 1) reads the post-norm hidden state at a
token and guesses the token k + 1 places after it; the model's own LM head guesses the
one after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

# Where a head's last product comes from: a matrix of its own, one that all heads share
# and that is stored with them, or the target's LM head, which isn't stored again.
Output = Literal["own", "joint", "base"]


class ResidualBlock(nn.Module):
    """``x + SiLU(linear(x))``; the identity when new."""

    def __init__(self, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=bias)
        # The reference leaves the bias random, so that its heads begin off the mark.
        nn.init.zeros_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [..., hidden]``."""
        return x + functional.silu(self.linear(x))


class MedusaHeads(nn.Module):
    """``heads`` guesses ahead of one hidden state.

    Args:
        hidden_size: Of the target.
        draft_vocab: How many tokens a head tells apart: the target's vocabulary, or
            fewer with ``token_map``.
        heads: How many; head k, from 1, guesses the token k + 1 places ahead.
        layers: Residual blocks of each.
        output: Where the last product comes from.
        token_map: ``[draft_vocab]`` the tokens a reduced vocabulary stands for.
        bias: Whether the blocks have one.
    """

    token_map: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        draft_vocab: int,
        heads: int,
        layers: int = 1,
        output: Output = "own",
        token_map: Sequence[int] | torch.Tensor | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if min(hidden_size, draft_vocab, heads, layers) < 1:
            raise ValueError(
                "hidden_size, draft_vocab, heads and layers must be >= 1, got "
                f"{hidden_size}, {draft_vocab}, {heads}, {layers}"
            )
        if output == "base" and token_map is not None:
            raise ValueError("a reduced vocabulary needs rows of its own, not the base")
        self.hidden_size, self.draft_vocab = hidden_size, draft_vocab
        self.output: Output = output
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(hidden_size, bias) for _ in range(layers)))
            for _ in range(heads)
        )
        outputs = {"own": heads, "joint": 1, "base": 0}[output]
        self.outputs = nn.ModuleList(
            nn.Linear(hidden_size, draft_vocab, bias=False) for _ in range(outputs)
        )
        mapped = None if token_map is None else torch.as_tensor(token_map).long()
        if mapped is not None and mapped.shape != (draft_vocab,):
            raise ValueError(
                f"token_map must be [{draft_vocab}], got {list(mapped.shape)}"
            )
        self.register_buffer("token_map", mapped)

    @property
    def layers(self) -> int:
        """Residual blocks of each head."""
        return len(self.blocks[0])  # type: ignore[arg-type]

    def copy_outputs(self, weight: torch.Tensor) -> None:
        """Begin with the target's LM head ``[vocab, hidden]``, or its mapped rows."""
        rows = weight if self.token_map is None else weight[self.token_map]
        with torch.no_grad():
            for output in self.outputs:
                output.weight.copy_(rows)  # type: ignore[operator]

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden] -> [heads, ..., hidden]``."""
        return torch.stack([block(hidden) for block in self.blocks])

    def forward(
        self, hidden: torch.Tensor, lm_head: nn.Module | None = None
    ) -> torch.Tensor:
        """Logits ``[heads, ..., draft_vocab]`` from ``hidden [..., hidden]``.

        Args:
            lm_head: The target's, for heads that have no output of their own.
        """
        features = self.features(hidden)
        if self.output == "own":
            pairs = zip(self.outputs, features, strict=True)
            return torch.stack([output(feature) for output, feature in pairs])
        output = self.outputs[0] if self.output == "joint" else lm_head
        if output is None:
            raise ValueError("these heads need the target's LM head")
        logits: torch.Tensor = output(features)
        return logits
