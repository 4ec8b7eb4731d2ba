"""What a comparison of engines found: rows of figures, and why some are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean
from typing import Any

from adaptspec.profile import PLAIN, Environment


@dataclass(frozen=True)
class Cell:
    """An engine's row in one class.

    Args:
        setting: The method that it decoded with.
        params: Its parameters.
        tokens_per_second: After the first token; median over prompts.
        seconds_to_first: Median over prompts.
        seconds_per_token: Of the whole answer, the prompt's reading included; median.
    """

    setting: str
    params: Mapping[str, Any]
    tokens_per_second: float
    seconds_to_first: float
    seconds_per_token: float
    prompts: int


@dataclass
class Row:
    """An engine with a way of decoding: plainly, tuned, or a method with its defaults.

    Args:
        cells: Class -> what was measured.
    """

    engine: str
    version: str
    way: str
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For people."""
        how = "plain decoding" if self.way == PLAIN else self.way
        return f"{self.engine}: {how}"

    def ratio(self, base: Row) -> float | None:
        """How many times as fast as ``base`` a token of an answer comes: geometric mean
        over the classes of ``base``; None where this lacks one of them."""
        if not base.cells.keys() <= self.cells.keys():
            return None
        ratios = [
            cell.seconds_per_token / self.cells[name].seconds_per_token
            for name, cell in base.cells.items()
            if self.cells[name].seconds_per_token > 0
        ]
        return geometric_mean(ratios) if ratios else None


@dataclass
class Comparison:
    """What was measured.

    Args:
        engines: Engine -> its version, models, type, threads and load.
        left_out: Engine -> why it isn't compared.
    """

    workload: str
    rows: list[Row] = field(default_factory=list)
    engines: dict[str, Environment] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        told = asdict(self)
        for row, of in zip(told["rows"], self.rows, strict=True):
            row["ratio"] = of.ratio(self.rows[0])
        return told
