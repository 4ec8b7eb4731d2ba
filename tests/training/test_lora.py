"""Medusa-2's second stage against slow oracles: losses, gradients, what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from adaptspec.heads.medusa import MedusaHeads
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import random_ids
from adaptspec_training.conversations import Example
from adaptspec_training.heads_trainee import HeadsTrainee, accuracies
from adaptspec_training.lora import JointTrainee, with_adapters
from adaptspec_training.trainer import Batch

WEIGHT, DECAY = 0.3, 0.5


def example(name: str, prompt: int, answer: int, seed: int) -> Example:
    ids = random_ids(prompt + answer, seed)
    return Example(name, tuple(ids), ((prompt, prompt + answer),))


EXAMPLES = [example("a", 3, 9, 1), example("b", 11, 4, 2), example("c", 2, 6, 3)]
BATCH = Batch(EXAMPLES, [0, 1, 2])


def joint(
    model: LanguageModel, *, distilled: bool = True, own: Any = None, most: int = 30
) -> tuple[JointTrainee, Any, MedusaHeads]:
    """With adapters that already do something, and no dropout."""
    torch.manual_seed(0)
    adapted = with_adapters(copy.deepcopy(model.model))
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    heads = MedusaHeads(model.head_size, model.vocab_size, 2)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1)
    trainee = HeadsTrainee(
        heads, lambda *_: torch.empty(0), model.vocab_size, decay=DECAY
    )
    made = JointTrainee(
        adapted,
        trainee,
        distilled=distilled,
        heads_weight=WEIGHT,
        own=own,
        most_tokens=most,
    )
    return made, adapted, heads


def whole(adapted: Any, one: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and states of one example, unpadded, at its positions."""
    output = adapted(input_ids=torch.tensor([one.tokens]), output_hidden_states=True)
    return output.logits[0, one.positions], output.hidden_states[-1][0, one.positions]


def naive_loss(adapted: Any, heads: MedusaHeads, distilled: bool) -> torch.Tensor:
    count = sum(len(e.positions) for e in EXAMPLES)
    target: Any = 0.0
    terms: list[list[torch.Tensor]] = [[], []]
    for one in EXAMPLES:
        logits, hidden = whole(adapted, one)
        if distilled:
            with torch.no_grad(), adapted.disable_adapter():
                own, _ = whole(adapted, one)
            probs = own.softmax(-1)
            target += (probs * (probs.log() - logits.log_softmax(-1))).sum() / count
        else:
            right = torch.tensor([one.tokens[p + 1] for p in one.positions])
            target += functional.cross_entropy(logits, right, reduction="sum") / count
        end = one.spans[0][1]
        for head in range(2):
            for row, position in enumerate(one.positions):
                at = position + head + 2
                if at < end:
                    found = heads(hidden[row])[head].log_softmax(-1)
                    terms[head].append(-found[one.tokens[at]])
    for head in range(2):
        target += WEIGHT * DECAY ** (head + 1) * torch.stack(terms[head]).mean()
    assert isinstance(target, torch.Tensor)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("most", [10, 1000])
def test_the_loss_and_its_gradients_are_those_of_whole_unpadded_examples(
    target: Callable[..., LanguageModel], architecture: str, distilled: bool, most: int
) -> None:
    made, adapted, heads = joint(target(architecture), distilled=distilled, most=most)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    trained += list(heads.parameters())
    # One portion a head's targets are averaged over: means of portions are weighted by
    # their answer tokens, those of heads are near them.
    loss = naive_loss(adapted, heads, distilled)
    expected = torch.autograd.grad(loss, trained)
    found = made.backward(BATCH, 0.0)
    if most == 1000:
        assert found.total == pytest.approx(float(loss.detach()), rel=1e-4)
        for parameter, gradient in zip(trained, expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    else:
        assert found.total == pytest.approx(float(loss.detach()), rel=0.05)


def test_kept_states_stand_for_the_forward_of_the_target_without_adapters(
    target: Callable[..., LanguageModel],
) -> None:
    model = target()
    states = []
    for one in EXAMPLES:
        with torch.no_grad():
            output = model.source(torch.tensor([one.tokens]), output_hidden_states=True)
        states.append(output.hidden_states[-1][0, one.positions])
    forwards: list[int] = []
    gradients = []
    for own in (None, lambda index, _: states[index]):
        made, adapted, heads = joint(model, own=own)
        forwards.append(0)

        def count(module: Any, inputs: Any, output: Any) -> None:
            forwards[-1] += output.shape[1]

        adapted.get_base_model().get_input_embeddings().register_forward_hook(count)
        made.backward(BATCH, 0.0)
        gradients.append([p.grad for p in (*adapted.parameters(), *heads.parameters())])
    for one, other in zip(*gradients, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert forwards[1] < 0.7 * forwards[0]


def test_no_logits_of_prompts_and_padding_are_computed(
    target: Callable[..., LanguageModel],
) -> None:
    made, adapted, _ = joint(target())
    rows = []
    adapted.get_base_model().get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(output.shape[:-1].numel())
    )
    made.measure([BATCH])
    assert sum(rows) == BATCH.positions


def test_what_is_measured_after_merging_is_the_stored_target(
    target: Callable[..., LanguageModel],
) -> None:
    model = target()
    made, _, _ = joint(model)
    ranks, loss = made.measure([BATCH])
    merged = made.merge()
    again, after = made.measure([BATCH])
    assert after == pytest.approx(loss, abs=1e-5)
    assert accuracies(again) == accuracies(ranks)
    summed = 0.0
    with torch.no_grad():
        for one in EXAMPLES:
            logits = merged(torch.tensor([one.tokens])).logits[0, one.positions]
            right = torch.tensor([one.tokens[p + 1] for p in one.positions])
            summed += float(functional.cross_entropy(logits, right, reduction="sum"))
        plain = model.model(torch.tensor([EXAMPLES[0].tokens])).logits
        before = merged(torch.tensor([EXAMPLES[0].tokens])).logits
    assert after == pytest.approx(summed / BATCH.positions, rel=1e-5)
    assert not torch.allclose(plain, before)
    made.close()
    hooks = merged.get_output_embeddings()._forward_pre_hooks
    assert not hooks
