"""How a model was quantised, as far as it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def quantiser_of(model: nn.Module) -> str | None:
    """The method as transformers names it (``gptq``, ``torchao``), None if unknown."""
    config = getattr(model, "config", None)
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        settings = getattr(
            getattr(model, "hf_quantizer", None), "quantization_config", None
        )
    return method_in(settings)


def method_in(settings: Any) -> str | None:
    """The method that a ``quantization_config`` names, an object's or a file's."""
    if isinstance(settings, Mapping):
        method = settings.get("quant_method")
        if method is None and any(settings.get(f"load_in_{n}bit") for n in (4, 8)):
            method = "bitsandbytes"
    else:
        method = getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def is_quantised(model: nn.Module) -> bool:
    """Whether the model says so; layers that somebody exchanged by hand don't."""
    return bool(
        getattr(model, "hf_quantizer", None)
        or getattr(model, "is_quantized", False)
        or getattr(getattr(model, "config", None), "quantization_config", None)
    )


def quantised_by(model: nn.Module) -> str:
    """A clause for a message about a model that doesn't run; empty if it isn't
    quantised."""
    method = quantiser_of(model)
    if method is None:
        return ""
    return (
        f"; it is quantised by {method}, whose layers may need another device or fail "
        "under torch.inference_mode: load it unquantised, or quantised otherwise"
    )


def splits_outliers(model: nn.Module) -> bool:
    """Whether layers compute some columns exactly, chosen over all rows of a pass.

    That is LLM.int8 of bitsandbytes with a threshold above 0, its default
    (https://arxiv.org/abs/2208.07339, section 3.2).
    """
    thresholds = (
        getattr(getattr(module, "state", None), "threshold", None)
        for module in model.modules()
    )
    return any(isinstance(t, int | float) and t > 0 for t in thresholds)
