"""The environment of a measurement: models, machine and package versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from adaptspec.heads.protocol import digest_of, name_of
from adaptspec.model.language_model import LanguageModel
from adaptspec.profile import Environment


def environment_of(model: LanguageModel, draft: LanguageModel | None) -> Environment:
    """What a measurement with these models, on this machine, holds for."""
    packages: Sequence[str] = ("adaptspec", "torch", "transformers")
    decoded: Any = model.model  # a caller's own model keeps its attention
    config = decoded.config.get_text_config(decoder=True)
    kernel = model.linear.kind.partition(":")[0]
    if (shapes := model.shapes.kind) != "dynamic":
        kernel = f"{kernel}, {shapes}"
    if model.compiled:
        kernel = f"{kernel}, compiled"
    return Environment(
        model=model.digest,
        model_name=model.name,
        draft=draft.digest if draft else None,
        draft_name=draft.name if draft else None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        device_name=device_name(model.device),
        threads=torch.get_num_threads(),
        heads=digest_of(model.heads.values()),
        heads_name=name_of(model.heads.values()),
        configuration=model.configuration,
        kernel=kernel,
        attention=str(getattr(config, "_attn_implementation", None) or "own"),
        versions={
            **{name: version(name) for name in packages},
            "python": platform.python_version(),
        },
    )


def device_name(device: torch.device) -> str:
    """What the machine calls its processor or accelerator."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
