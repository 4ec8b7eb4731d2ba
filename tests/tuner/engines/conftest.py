"""A workload of two classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """Eight prompts of each class."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"{name}/{n}", "class": name, "prompt": f"{name} {n}"}
        for name in ("summary", "code")
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
