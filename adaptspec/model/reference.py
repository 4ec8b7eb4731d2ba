"""What a model itself computes of a text, to compare other ways to decode with."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adaptspec.model import miniature
from adaptspec.model.rotary import switching_lengths

if TYPE_CHECKING:
    from adaptspec.model.forward import ForwardModel

PROMPT_TOKENS = 12
COMPARED_STEPS = 4  # of generate

# Relative error of logits that rounding explains; a wrong mask or position gives more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
# In half precision rounding alone moves logits; how far is measured on the model.
HALF_TOLERANCE = 0.1
NOISE_ALLOWED = 3.0
MOST_TOLERATED = 0.4
# One forward twice with other tokens elsewhere: nothing but routing may move a bit.
ROUTING_TOLERANCE = 1e-5


def generated(
    model: ForwardModel, prompt: list[int]
) -> tuple[list[int], list[torch.Tensor]]:
    """A few tokens of the model's own ``generate``, and the logits they are from.

    A model without ``generate``, or whose own raises, is taken at its whole forward.
    """
    from transformers import GenerationConfig

    module: Any = model.model
    stored = getattr(module, "generation_config", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
            output = _own_generate(module)(
                torch.tensor([prompt], device=model.device),
                attention_mask=torch.ones((1, len(prompt)), device=model.device).long(),
                max_new_tokens=COMPARED_STEPS,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = [rows[0] for rows in output.logits]
        return [int(token) for token in output.sequences[0, len(prompt) :]], logits
    except Exception:
        tokens: list[int] = []
        logits = []
        for _ in range(COMPARED_STEPS):
            logits.append(whole_logits(model, [[*prompt, *tokens]])[0][-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens, logits
    finally:
        if stored is not None:
            module.generation_config = stored


def _own_generate(module: Any) -> Callable[..., Any]:
    """That of its class: on the object itself it may be bound to a decoder."""
    own = getattr(type(module), "generate", None)
    return module.generate if own is None else functools.partial(own, module)


def tolerance_of(model: ForwardModel, prompt: list[int]) -> float:
    exact = TOLERANCE.get(model.dtype)
    if exact is not None:
        return exact
    # What the same token's logits differ by between forwards of two lengths.
    longer = whole_logits(model, [[*prompt, *random_tokens(model, 5)]])[0]
    noise = max(
        logit_distance(whole_logits(model, [prompt[:count]])[0][-1], longer[count - 1])
        for count in (len(prompt) // 2, len(prompt))
    )
    return min(max(HALF_TOLERANCE, NOISE_ALLOWED * noise), MOST_TOLERATED)


def whole_logits(
    model: ForwardModel, texts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Logits ``[tokens, vocab]`` of each text, in one forward without cache or mask.

    Shorter texts are filled up behind their end, where a causal model can't look.
    """
    longest = max(map(len, texts))
    rows = [[*text, *([text[-1]] * (longest - len(text)))] for text in texts]
    ids = torch.tensor(rows, device=model.device)
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if model.takes_positions:  # as generate does: some count them from elsewhere
        places = torch.arange(longest, device=model.device)
        given["position_ids"] = places.expand(len(rows), longest)
    logits = model.evaluate(**given).logits
    return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]


def logit_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of logits; infinite where other ones aren't finite numbers."""
    found, expected = found.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    found, expected = found[finite], expected[finite]
    scale = (expected - expected.mean()).norm().clamp_min(1e-9)
    return float((found - expected).norm() / scale) if finite.any() else 0.0


def short_length(model: ForwardModel) -> int:
    return max(1, min(PROMPT_TOKENS, room(model) // 2))


def room(model: ForwardModel) -> int:
    """Positions there are, up to the first at which a rotation switches."""
    switches = switching_lengths(model.config)
    return min([miniature.configured_length(model.config) or 1 << 30, *switches])


def random_tokens(model: ForwardModel, count: int) -> list[int]:
    """Random tokens; the lowest ids and padding, which mean something, are left out."""
    generator = torch.Generator().manual_seed(0)
    first = min(4, model.vocab_size // 2)
    drawn = torch.randint(first, model.vocab_size, (count,), generator=generator)
    padding = getattr(model.config, "pad_token_id", None)
    return [int(t) if int(t) != padding else first - 1 for t in drawn]


def in_one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
