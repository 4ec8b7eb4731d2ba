"""Medusa-2 (arXiv:2401.10774, section 2.2.2): heads and target trained together.

The target learns through LoRA adapters, gently: its own loss keeps what it says, the
heads' loss makes its hidden states tell more of what comes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from adaptspec.errors import TrainingError
from adaptspec_training.conversations import Example
from adaptspec_training.heads_trainee import Features, HeadsTrainee, accuracies
from adaptspec_training.options import NO_PEFT
from adaptspec_training.trainer import Batch, Losses, Trainee

# The reference recipe's (axolotl fork, vicuna_7b_qlora_stage2): rank, alpha, dropout.
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 32, 16, 0.05
# Weight of the heads' loss beside the target's: as there; the smaller one where the
# target is held to its own earlier distribution.
HEADS_WEIGHT, HEADS_WEIGHT_DISTILLED = 0.2, 0.01


def with_adapters(model: nn.Module) -> Any:
    """``model`` with LoRA adapters in its Linear layers; its LM head stays as it is.

    Raises:
        TrainingError: if peft isn't installed or finds nothing to adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainingError(NO_PEFT) from None
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft asks for an attribute by a name that transformers gives up.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")
            # What it then does by itself, for GPT-2's kind of layer.
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            return get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(
            f"LoRA finds nothing to adapt in this model ({error}); use --method "
            "medusa-1"
        ) from error


class JointTrainee(Trainee):
    """Heads and a target with adapters.

    The LM head is given the states at the answers' positions alone, so no logits of
    prompts and padding are computed; whatever the model does to its logits afterwards
    it does to these.

    Args:
        adapted: From :func:`with_adapters`.
        heads: Their trainee; its features aren't used.
        distilled: Whether the target is held to its own distribution without adapters,
            in place of the tokens of the answers.
        heads_weight: Of the heads' loss.
        own: States of the target without adapters, where they are kept: its
            distribution then costs one product and no forward.
        most_tokens: Padded tokens of one forward.
    """

    kind: ClassVar[str] = "medusa"
    lowers_memory: ClassVar[str] = "--chunk, --batch-tokens or --max-length"

    def __init__(
        self,
        adapted: Any,
        heads: HeadsTrainee,
        *,
        distilled: bool,
        heads_weight: float,
        own: Features | None = None,
        most_tokens: int = 2048,
    ) -> None:
        self._model, self._heads = adapted, heads
        self._distilled, self._weight = distilled, heads_weight
        self._own, self._most = own, most_tokens
        self._device = next(adapted.parameters()).device
        self._select: Callable[[torch.Tensor], torch.Tensor] | None = None
        head = adapted.get_base_model().get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._selected)

    def modules(self) -> Mapping[str, nn.Module]:
        """The heads and, of the target, its adapters."""
        return {"heads": self._heads.heads, "target": self._model}

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """Adapters at the rate, the heads at theirs."""
        adapters = [p for p in self._model.parameters() if p.requires_grad]
        return [(adapters, 1.0), *self._heads.groups()]

    def backward(self, batch: Batch, progress: float) -> Losses:
        """The target's loss and, weighted, the heads'."""
        self._model.train()
        total = batch.positions
        target_loss, heads_loss = 0.0, 0.0
        parts: dict[str, float] = {}
        for some in self._portions(batch):
            share = some.positions / total
            logits, hidden = self._forward(some)
            loss = self._target_loss(some, logits) * share
            del logits
            leaf = hidden.detach().float().requires_grad_()
            found = self._heads.backward_heads(
                leaf, self._heads.targets(some), self._weight * share
            )
            gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            torch.autograd.backward([loss, hidden], [None, gradient.to(hidden.dtype)])
            target_loss += float(loss.detach())
            heads_loss += found.total
            for name, value in found.parts.items():
                parts[name] = parts.get(name, 0.0) + value * share
        self._model.eval()
        parts["loss_target"] = target_loss
        return Losses(target_loss + heads_loss, parts)

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """The heads' measures on the adapted target, and its own loss."""
        ranks, loss = self.measure(batches)
        return {"heads": accuracies(ranks), "target_loss": loss}

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, float]:
        """The heads' ranks, and the target's loss: both as they are now.

        Returns:
            Ranks as :meth:`HeadsTrainee.ranks` has them, in an order of their own, and
            the mean cross entropy of the answers' tokens.
        """
        self._model.eval()
        ranks, summed, count = [], 0.0, 0
        for batch in batches:
            for some in self._portions(batch):
                logits, hidden = self._forward(some)
                following = self._following(some)
                loss = functional.cross_entropy(
                    logits.float(), following, reduction="sum"
                )
                summed, count = summed + float(loss), count + len(following)
                ranks.append(self._heads.ranks_at(hidden.float(), some))
        return torch.cat(ranks, 1), summed / max(1, count)

    def merge(self) -> Any:
        """Put the adapters into the target's weights; the target.

        What is measured from then on is what is stored, rounded as its type rounds.
        """
        self._model = self._model.merge_and_unload().eval()
        return self._model

    def close(self) -> None:
        """The target is left to others, its LM head as it was."""
        self._hook.remove()

    def _target_loss(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if not self._distilled:
            return functional.cross_entropy(logits.float(), self._following(batch))
        # The divergence is a mean over answer tokens; the reference divides by all.
        return functional.kl_div(
            logits.float().log_softmax(-1),
            self._own_logits(batch).float().log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )

    @torch.no_grad()
    def _own_logits(self, batch: Batch) -> torch.Tensor:
        """The distribution of the target without adapters at the batch's positions."""
        with self._model.disable_adapter():
            if self._own is None:
                return self._forward(batch)[0]
            pairs = zip(batch.indices, batch.examples, strict=True)
            states = torch.cat([self._own(index, example) for index, example in pairs])
            # One token is run for what the model does around its LM head.
            one = torch.zeros((1, 1), dtype=torch.long, device=self._device)
            return self._logits(
                lambda hidden: states.to(self._device, hidden.dtype),
                input_ids=one,
                attention_mask=one + 1,
            )

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and states ``[positions, ...]`` at the batch's positions."""
        rows = [r for r, e in enumerate(batch.examples) for _ in e.positions]
        columns = [p for e in batch.examples for p in e.positions]
        places = (
            torch.tensor(rows, device=self._device),
            torch.tensor(columns, device=self._device),
        )
        kept: list[torch.Tensor] = []

        def select(hidden: torch.Tensor) -> torch.Tensor:
            kept.append(hidden[places])
            return kept[0]

        logits = self._logits(select, **self._padded(batch))
        return logits, kept[0]

    def _logits(
        self,
        select: Callable[[torch.Tensor], torch.Tensor],
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Logits ``[positions, vocabulary]`` of what ``select`` makes of the states."""
        self._select = select
        try:
            with self._heads.casting():
                found: torch.Tensor = self._model(**inputs, use_cache=False).logits
        finally:
            self._select = None
        return found[0]

    def _selected(self, module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        if self._select is None:
            return None
        return (self._select(arguments[0])[None], *arguments[1:])

    def _portions(self, batch: Batch) -> list[Batch]:
        """Parts whose padded tokens fit one forward; alike lengths waste no padding."""
        pairs = sorted(
            zip(batch.indices, batch.examples, strict=True),
            key=lambda pair: len(pair[1].tokens),
        )
        portions: list[list[tuple[int, Example]]] = []
        for pair in pairs:
            longest = len(pair[1].tokens)
            if portions and longest * (len(portions[-1]) + 1) <= self._most:
                portions[-1].append(pair)
            else:
                portions.append([pair])
        return [Batch([e for _, e in p], [i for i, _ in p]) for p in portions]

    def _padded(self, batch: Batch) -> dict[str, torch.Tensor]:
        longest = max(len(example.tokens) for example in batch.examples)
        tokens = torch.zeros((len(batch.examples), longest), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, example in enumerate(batch.examples):
            tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
            mask[row, : len(example.tokens)] = 1
        return {
            "input_ids": tokens.to(self._device),
            "attention_mask": mask.to(self._device),
        }

    def _following(self, batch: Batch) -> torch.Tensor:
        """The token after each position."""
        found = [e.tokens[p + 1] for e in batch.examples for p in e.positions]
        return torch.tensor(found, device=self._device)
