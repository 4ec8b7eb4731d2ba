"""Load a language model and its tokenizer from a folder, or take a loaded one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptspec.errors import ModelLoadError
from adaptspec.model.checkpoints import device_named, read_model, read_tokenizer
from adaptspec.model.fixed_shapes import Shapes
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.views import unwrapped


def load_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    accelerate: bool = True,
    trust_remote_code: bool = False,
    shapes: Shapes = "auto",
    compile: bool = False,
) -> LanguageModel:
    """Load a model folder or hub name, or take a loaded model as it is.

    Args:
        dtype: ``auto`` keeps the checkpoint's.
        device: Default: CUDA if there is one, else the CPU.
        trust_remote_code: Whether code that comes with the model may run.
        shapes: Of forwards, see :class:`LanguageModel`.
        compile: See :class:`LanguageModel`.

    Raises:
        ModelLoadError: if it can't be found, read, or isn't a causal LM; if the device
            isn't there; if it has code of its own that isn't trusted.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            tokenizer = _tokenizer_of(unwrapped(model), trust_remote_code)
        return LanguageModel(
            model, tokenizer, accelerate=accelerate, shapes=shapes, compile=compile
        )
    if not isinstance(model, str | os.PathLike):
        raise ModelLoadError(
            f"a folder, a hub name or a transformers model is expected, got "
            f"{type(model).__module__}.{type(model).__name__}; {_way_out(model)}"
        )
    path = str(model)
    loaded = read_model(path, dtype, device_named(device), trust_remote_code)
    if tokenizer is None:
        tokenizer = read_tokenizer(path, trust_remote_code)
    return LanguageModel(
        loaded,
        tokenizer,
        Path(path).name if Path(path).exists() else path,
        own_weights=True,
        accelerate=accelerate,
        shapes=shapes,
        compile=compile,
    )


def _way_out(given: object) -> str:
    """What to pass in place of another library's object."""
    if isinstance(getattr(given, "model", None), nn.Module):  # a pipeline, a quantiser
        return "pass its .model"
    return (
        "pass the module it was made from, since graphs that were exported (ONNX, "
        "OpenVINO, torch.export) and other engines (vLLM, llama.cpp) run their own code"
    )


def _tokenizer_of(model: nn.Module, trust_remote_code: bool) -> Any:
    """The tokenizer beside a loaded model's weights, None if there is none."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path or not Path(path).is_dir():
        return None
    try:
        return read_tokenizer(path, trust_remote_code)
    except ModelLoadError:
        return None
