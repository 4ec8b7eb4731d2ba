"""The options of a training run, and its target model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from adaptspec.errors import TrainingError
from adaptspec.heads.attached import hidden_problem
from adaptspec.heads.medusa import Output
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec_training.heads_trainee import DECAY

NO_PEFT = (
    "medusa-2 trains the target through LoRA and needs peft; install adaptspec[train]"
)


@dataclass(frozen=True)
class Options:
    """What a run is made of; all but the machine's part decides its result.

    The defaults are the reference recipe's where a source stands beside them
    (Medusa-1 and stage 1 of Medusa-2, arXiv:2401.10774 and its axolotl fork).
    """

    method: Literal["medusa-1", "medusa-2"] = "medusa-1"
    answers: Literal["auto", "self", "given"] = "auto"
    heads: int = 4  # 5 in the recipe, whose trees use 4
    layers: int = 1  # as there
    output: Output = "joint"
    draft_vocab: int = 16384  # 0: all tokens, as there
    epochs: int = 2  # as there
    learning_rate: float = 5e-4  # as there
    heads_factor: float = 4.0  # as there; biases included
    warmup_steps: int = 40  # as there
    decay: float = DECAY
    batch_tokens: int = 4096  # 32768 there, with far more data
    chunk: int = 1024
    max_length: int = 2048
    samples: int = 1
    temperature: float = 0.3  # of the answers, as in the reference's generator
    max_new_tokens: int = 256
    answer_batch: int = 32
    answer_seconds: float | None = None
    self_prompts: int = 0
    held_out: float = 0.1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    features: Literal["auto", "store", "recompute"] = "auto"
    joint_epochs: int = 2  # as there, stage 2
    heads_weight: float | None = None
    seed: int = 0


def check_options(options: Options, data: object, load_in: str | None) -> None:
    """Raise :class:`TrainingError` where options contradict each other."""
    if data is None and options.self_prompts < 2:
        raise TrainingError(
            "training needs prompts: give --data FILE, or --self-prompts N to have "
            "the model write them"
        )
    if data is not None and options.self_prompts:
        raise TrainingError("give --data or --self-prompts, not both")
    if not 0 < options.held_out < 1:
        raise TrainingError(f"0 < held_out < 1 must hold, got {options.held_out}")
    if options.method == "medusa-2" and importlib.util.find_spec("peft") is None:
        raise TrainingError(NO_PEFT)
    if load_in and options.method == "medusa-2":
        raise TrainingError(
            "medusa-2 changes the target's weights and can't store a quantised one; "
            "load it unquantised, or use --method medusa-1"
        )


def target_problem(target: LanguageModel) -> str | None:
    """Why heads can't be trained for ``target``, or could never be used then."""
    model: Any = target.model
    head = model.get_output_embeddings()
    if head is None:
        return f"{target.name} has no LM head that heads could begin with"
    if head.weight.dim() != 2 or not head.weight.dtype.is_floating_point:
        return (
            f"the LM head of {target.name} is quantised, so no head can begin with it; "
            "load the target unquantised, or with its LM head left alone"
        )
    if target.capability.level == "plain":
        return (
            f"{target.name} can't verify drafts, so heads would never be asked: "
            f"{target.capability.reason}"
        )
    return hidden_problem(target)


def load_target(
    model: str | Path,
    dtype: str,
    device: str | None,
    load_in: str | None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """The target as training uses it: untouched, quantised where asked.

    Raises:
        AdaptSpecError: if it can't be loaded so.
    """
    if load_in is None:
        return load_model(
            model,
            dtype=dtype,
            device=device,
            accelerate=False,
            trust_remote_code=trust_remote_code,
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    try:
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=load_in == "4bit", load_in_8bit=load_in == "8bit"
        )
        loaded = AutoModelForCausalLM.from_pretrained(
            str(model),
            quantization_config=config,
            device_map=device or "auto",
            trust_remote_code=trust_remote_code,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(model), trust_remote_code=trust_remote_code
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise TrainingError(
            f"can't load {model} in {load_in}: {first} (install bitsandbytes, or "
            "leave --load-in out)"
        ) from error
    return LanguageModel(loaded, tokenizer, Path(model).name, accelerate=False)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the machine multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return False
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    avx = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(amx() or avx())


def digest(value: Any) -> str:
    """A short fingerprint of a JSON-ready value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
