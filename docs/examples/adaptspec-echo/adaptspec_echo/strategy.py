"""Draft that the last tokens repeat: for output such as ``| --- | --- | --- |``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from adaptspec.params import DraftingParams, Tunable
from adaptspec.strategy import Context, Drafter, Strategy, Target, TokenTree


class EchoParams(DraftingParams):
    """Declared once: validated, tuned, shown by ``adaptspec strategies``."""

    period: Annotated[int, Tunable(1, 8)] = Field(
        4, ge=1, le=64, description="longest repeated piece looked for, in tokens"
    )
    draft_length: Annotated[int, Tunable(1, 16)] = Field(6, ge=1, le=128)


class Echo(Strategy):
    """Costs microseconds and proposes nothing where nothing repeats."""

    name = "echo"
    summary = "drafts that the last tokens repeat"
    Params = EchoParams
    params: EchoParams

    def start(self, target: Target) -> Drafter:
        """Nothing to keep between steps."""
        return _EchoDrafter(self.params)


class _EchoDrafter(Drafter):
    def __init__(self, params: EchoParams) -> None:
        self._params = params

    def propose(self, context: Context) -> TokenTree:
        root = context.ids[-1]
        piece = repeated(context.ids, self._params.period)
        count = min(self._params.draft_length, context.room - 1, context.max_nodes)
        if not piece or count < 1:
            return TokenTree.root_only(root)
        return TokenTree.chain(root, [piece[i % len(piece)] for i in range(count)])


def repeated(ids: Sequence[int], longest: int) -> list[int]:
    """The shortest piece of at most ``longest`` tokens that stands twice at the end.

    Empty if there is none.
    """
    for length in range(1, min(longest, len(ids) // 2) + 1):
        end = list(ids[-2 * length :])
        if end[:length] == end[length:]:
            return end[length:]
    return []
