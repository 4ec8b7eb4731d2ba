"""Medusa-2 (arXiv:2401.10774, section 2.2.2): heads and target trained together.

The target learns through LoRA adapters, gently: its own loss keeps what it says, the
heads' loss makes its hidden states tell more of what comes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from adaptspec.errors import TrainingError
from adaptspec_training.medusa import HeadsTrainee
from adaptspec_training.training import Batch, Losses, Trainee

# The reference recipe's (axolotl fork, vicuna_7b_qlora_stage2): rank, alpha, dropout.
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 32, 16, 0.05
# Weight of the heads' loss beside the target's: as there; the smaller one where the
# target is held to its own earlier law.
HEADS_WEIGHT, HEADS_WEIGHT_DISTILLED = 0.2, 0.01


def with_adapters(model: nn.Module) -> Any:
    """``model`` with LoRA adapters in its Linear layers; its LM head stays as it is.

    Raises:
        TrainingError: if peft isn't installed or finds nothing to adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise TrainingError(
            "medusa-2 trains the target through LoRA and needs peft; "
            "install adaptspec[train]"
        ) from None
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
            return get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(
            f"LoRA finds nothing to adapt in this model ({error}); use --method "
            "medusa-1"
        ) from error


class JointTrainee(Trainee):
    """Heads and a target with adapters.

    Args:
        adapted: From :func:`with_adapters`.
        heads: Their trainee; its features aren't used.
        distilled: Whether the target is held to its own law without adapters, in
            place of the tokens of the answers.
        heads_weight: Of the heads' loss.
        most_tokens: Padded tokens of one forward.
    """

    kind: ClassVar[str] = "medusa"

    def __init__(
        self,
        adapted: Any,
        heads: HeadsTrainee,
        *,
        distilled: bool,
        heads_weight: float,
        most_tokens: int = 2048,
    ) -> None:
        self._model, self._heads = adapted, heads
        self._distilled, self._weight = distilled, heads_weight
        self._most = most_tokens
        self._device = next(adapted.parameters()).device
        self._seen: torch.Tensor | None = None
        adapted.get_base_model().get_output_embeddings().register_forward_pre_hook(
            self._see
        )

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
            rows, following = self._places(some)
            with self._casting():
                logits = self._model(**self._padded(some)).logits[rows]
            assert self._seen is not None
            hidden = self._seen[rows]
            loss = self._target_loss(some, logits, rows, following) * share
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
        found = self._heads.evaluate(batches)
        found["target_loss"] = self.held_out_loss(batches)
        return found

    @torch.no_grad()
    def features(self, batch: Batch) -> list[torch.Tensor]:
        """Hidden states of the adapted target at each example's positions."""
        found = []
        for some in self._portions(batch):
            rows, _ = self._places(some)
            with self._casting():
                self._model(**self._padded(some))
            assert self._seen is not None
            sizes = [len(example.positions) for example in some.examples]
            found += list(torch.split(self._seen[rows].float(), sizes))
        return found

    @torch.no_grad()
    def held_out_loss(self, batches: Sequence[Batch]) -> float:
        """Mean cross entropy of the answers' tokens under the target as it is now."""
        self._model.eval()
        summed, count = 0.0, 0
        for batch in batches:
            for some in self._portions(batch):
                rows, following = self._places(some)
                with self._casting():
                    logits = self._model(**self._padded(some)).logits[rows]
                loss = functional.cross_entropy(
                    logits.float(), following, reduction="sum"
                )
                summed, count = summed + float(loss), count + len(following)
        return summed / max(1, count)

    def _target_loss(
        self,
        batch: Batch,
        logits: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        following: torch.Tensor,
    ) -> torch.Tensor:
        if not self._distilled:
            return functional.cross_entropy(logits.float(), following)
        # The divergence is a mean over answer tokens; the reference divides by all.
        seen = self._seen
        with torch.no_grad(), self._model.disable_adapter(), self._casting():
            own = self._model(**self._padded(batch)).logits[rows]
        self._seen = seen
        return functional.kl_div(
            logits.float().log_softmax(-1),
            own.float().log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )

    def _portions(self, batch: Batch) -> list[Batch]:
        """Parts, in order, whose padded tokens fit one forward."""
        portions: list[list[Any]] = []
        for pair in zip(batch.indices, batch.examples, strict=True):
            longest = max(
                [len(pair[1].tokens)]
                + ([len(e.tokens) for _, e in portions[-1]] if portions else [])
            )
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
            "use_cache": False,  # type: ignore[dict-item]
        }

    def _places(
        self, batch: Batch
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Row and column of each position, and the token after it."""
        rows = [r for r, e in enumerate(batch.examples) for _ in e.positions]
        columns = [p for e in batch.examples for p in e.positions]
        following = [e.tokens[p + 1] for e in batch.examples for p in e.positions]
        places = (
            torch.tensor(rows, device=self._device),
            torch.tensor(columns, device=self._device),
        )
        return places, torch.tensor(following, device=self._device)

    def _see(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._seen = arguments[0]

    def _casting(self) -> Any:
        return self._heads.casting()
