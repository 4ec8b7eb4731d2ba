"""Weights that were repacked don't stay in memory a second time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptspec.acceleration import linear as subject
from adaptspec.acceleration.file_pages import FilePages
from adaptspec.acceleration.linear import (
    ProductChoice,
    accelerate_linears,
    choose,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or choose(torch.float32, True).kind != "packed",
    reason="maps of Linux, and a kernel to pack for",
)

SIZE, LAYERS = 512, 4
BYTES = SIZE * SIZE * 4


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Layers whose weights lie in a mapped file, all of them read once."""
    choice = ProductChoice(cast(Any, "packed"), 1 << 30, "chosen by the test")
    monkeypatch.setattr(subject, "choose", lambda *_: choice)
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(LAYERS)))
    save_file(dict(layers.state_dict()), path)
    layers.load_state_dict(load_file(path), assign=True)
    _ = [float(parameter.detach().sum()) for parameter in layers.parameters()]
    assert resident(path) >= LAYERS * BYTES
    return layers


def resident(path: Path) -> int:
    """Bytes of a mapped file that count as this process's memory."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            ours = line.endswith(path.name)
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_pages_of_packed_weights_are_given_back(
    mapped: nn.Sequential, tmp_path: Path
) -> None:
    x = torch.randn(3, SIZE)
    with torch.inference_mode():
        expected = mapped(x)
        report = accelerate_linears(mapped, own_weights=True)
        assert report.replaced == LAYERS
        # Biases keep the file mapped.
        assert resident(tmp_path / "model.safetensors") < BYTES
        torch.testing.assert_close(mapped(x), expected, rtol=1e-4, atol=1e-4)
        assert cast(nn.Linear, mapped[0]).bias.abs().sum() > 0


def test_a_weight_that_somebody_holds_keeps_its_contents(
    mapped: nn.Sequential,
) -> None:
    held = cast(nn.Linear, mapped[1]).weight
    with torch.no_grad():
        held.add_(1.0)  # what the file says would be another weight
    expected = held.detach().clone()
    assert accelerate_linears(mapped, own_weights=True).replaced == LAYERS
    assert torch.equal(held, expected)


def test_memory_that_is_no_files_is_left_alone() -> None:
    ones = torch.ones(1 << 18)
    assert not FilePages().give_back(ones.untyped_storage())
    assert ones.sum() == 1 << 18
