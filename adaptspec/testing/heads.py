"""Heads for tests: random ones, hostile ones, and ones that are often right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from adaptspec.heads.attached import MedusaTrained
from adaptspec.heads.medusa import MedusaHeads, Output

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel

Kind = Literal["random", "constant", "nan", "infinite", "wrong", "fitted"]

FITTING_STEPS = 60


def tiny_heads(
    model: LanguageModel,
    kind: Kind = "random",
    *,
    heads: int = 3,
    output: Output = "own",
    token_map: Sequence[int] | None = None,
    seed: int = 0,
    texts: Sequence[Sequence[int]] = (),
) -> MedusaHeads:
    """Medusa heads for a tiny model, in its type.

    Args:
        kind: ``random`` weights; the same guesses whatever the text (``constant``);
            logits that aren't numbers (``nan``, ``infinite``); the least likely tokens
            of fitted heads (``wrong``); or ``fitted`` to ``texts`` in a second or two.
        texts: Token ids to fit to, such as what the model itself emits.
    """
    size = model.vocab_size if token_map is None else len(token_map)
    generator = torch.Generator().manual_seed(seed)
    made = MedusaHeads(model.head_size, size, heads, 1, output, token_map)
    with torch.no_grad():
        for parameter in made.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * 0.5)
    if kind == "constant":
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
    elif kind in ("nan", "infinite"):
        value = float("nan" if kind == "nan" else "inf")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(value)
    elif kind in ("fitted", "wrong"):
        _fit(made, model, texts)
        if kind == "wrong":
            with torch.no_grad():
                for matrix in made.outputs:
                    matrix.weight.neg_()  # type: ignore[operator]
    return made.to(model.dtype).eval()


def attach_tiny_heads(
    model: LanguageModel, kind: Kind = "random", **options: object
) -> LanguageModel:
    """``model`` with such heads attached; options as :func:`tiny_heads` takes them."""
    build: Callable[..., MedusaHeads] = tiny_heads
    made = build(model, kind, **options)
    model.attach(MedusaTrained(model, made, name=f"{kind} heads"))
    return model


def show_other_states(model: LanguageModel) -> None:
    """Make ``model`` show last hidden states that aren't what its LM head reads."""
    inner: Any = model.model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if output.hidden_states is not None:
            last = -output.hidden_states[-1]
            output.hidden_states = (*output.hidden_states[:-1], last)
        return output

    model.model.forward = shifted


def _fit(
    heads: MedusaHeads, model: LanguageModel, texts: Sequence[Sequence[int]]
) -> None:
    """Adam on the paper's loss, over all texts at once."""
    if not texts:
        raise ValueError("heads are fitted to texts, got none")
    states, labels = [], []
    count = len(heads.blocks)
    for ids in texts:
        with torch.inference_mode():
            cache = model.new_cache(len(ids))
            forward = model.prefill(ids, cache, hidden_layers=(-1,))
        # Out of inference mode, so that gradients may pass through what is made of it.
        hidden = forward.hidden[-1].float().clone()
        usable = len(ids) - 1 - count
        if usable < 1:
            continue
        states.append(hidden[:usable])
        labels.append(
            torch.tensor(
                [[ids[at + 2 + k] for at in range(usable)] for k in range(count)]
            )
        )
    inputs, targets = torch.cat(states), torch.cat(labels, 1)
    if heads.token_map is not None:
        places = torch.full((model.vocab_size,), -100)
        places[heads.token_map] = torch.arange(heads.draft_vocab)
        targets = places[targets]
    lm_head = None
    if heads.output == "base":
        lm_head = torch.nn.Linear(heads.hidden_size, model.vocab_size, bias=False)
        weight = model.source.get_output_embeddings().weight  # type: ignore[operator]
        lm_head.weight = torch.nn.Parameter(weight.detach().float(), False)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    with torch.enable_grad():
        for _ in range(FITTING_STEPS):
            logits = heads(inputs, lm_head)
            loss = functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-100
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
