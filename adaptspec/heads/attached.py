"""Medusa heads at work beside one target: fast, and only as much as a tree asks for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from adaptspec.acceleration.linear import accelerate_linears
from adaptspec.acceleration.top_tokens import COMPARED_TOKENS, likeliest, sureness
from adaptspec.heads.checkpoints import digest_of, read_heads
from adaptspec.heads.measured_paths import CALIBRATION, KIND, Paths, Ranks, read_json
from adaptspec.heads.medusa import MedusaHeads

if TYPE_CHECKING:
    from adaptspec.model.language_model import LanguageModel

PROBE_TOKENS = 12
# Of the range of a row's logits: what rounding may put between two likeliest tokens.
ROUNDING_SHARE = 0.02


@dataclass(frozen=True)
class Guesses:
    """What heads guess after one hidden state.

    Args:
        tokens: ``tokens[k]``: the likeliest of head ``k + 1``, likeliest first.
        chances: Their probabilities; empty if not asked for.
        levels: How sure each head is of its first: 0..3.
    """

    tokens: list[list[int]]
    chances: list[list[float]]
    levels: list[int]


class MedusaTrained:
    """Heads for one target, in its type and on its device.

    Args:
        heads: Are not changed, unless ``own`` says that nobody else uses them: they
            may then be repacked.
        paths: As :class:`~adaptspec.heads.checkpoints.HeadsFile` has them.
        ranks: The same.
    """

    kind = KIND

    def __init__(
        self,
        model: LanguageModel,
        heads: MedusaHeads,
        paths: Paths | None = None,
        ranks: Ranks | None = None,
        name: str = KIND,
        *,
        own: bool = False,
    ) -> None:
        self.name = name
        self.paths, self.ranks = paths, ranks
        self.digest = digest_of(heads, paths, ranks)
        if not own:
            heads = copy.deepcopy(heads)
        self._heads = heads.to(model.device, model.dtype).eval().requires_grad_(False)
        self.nbytes = sum(tensor.nbytes for tensor in self._heads.state_dict().values())
        self._map = self._heads.token_map
        if self._map is not None and bool(
            torch.equal(self._map.cpu(), torch.arange(model.vocab_size))
        ):
            self._map = None
        accelerate_linears(self._heads, own_weights=True)

    @property
    def count(self) -> int:
        """Number of heads."""
        return len(self._heads.blocks)

    @property
    def width(self) -> int:
        """Size of the heads' vocabulary."""
        return self._heads.draft_vocab

    @torch.inference_mode()
    def guess(
        self,
        hidden: torch.Tensor,
        count: int,
        top_k: int,
        lm_head: nn.Module,
        *,
        chances: bool = False,
    ) -> Guesses:
        """The ``top_k`` likeliest tokens of the first ``count`` heads.

        Args:
            hidden: ``[hidden]``, as the LM head reads it.
            lm_head: The target's, for heads without an output.
            chances: Whether to sum over the vocabulary for probabilities.
        """
        heads = self._heads
        rows = hidden[None]
        features = [block(rows) for block in heads.blocks[:count]]
        if heads.output == "own":
            logits = torch.cat(
                [
                    output(feature)
                    for output, feature in zip(heads.outputs, features, strict=False)
                ]
            )
        else:
            # One product for all heads reads the matrix once.
            output = lm_head if heads.output == "base" else heads.outputs[0]
            logits = output(torch.cat(features))
        found = likeliest(logits, min(max(top_k, COMPARED_TOKENS), logits.shape[-1]))
        levels: list[int] = sureness(logits, found).tolist()
        found = found[:, :top_k]
        shares: list[list[float]] = []
        if chances:
            sums = logits.float().logsumexp(-1, keepdim=True)
            told = (logits.gather(1, found).float() - sums).exp()
            shares = told.nan_to_num(0.0).clamp(0.0, 1.0).tolist()
        tokens = found if self._map is None else self._map[found]
        return Guesses(tokens.tolist(), shares, levels)


def open_medusa(path: Path, model: LanguageModel) -> MedusaTrained | None:
    """Medusa heads in a folder; None if it says that it holds another kind.

    Raises:
        HeadsLoadError: if they are damaged or don't fit ``model``.
    """
    found = read_json(path / CALIBRATION) if path.is_dir() else None
    if found is not None and found.get("kind", KIND) != KIND:
        return None
    file = read_heads(path, model.head_size, model.vocab_size)
    name = path.resolve().name
    return MedusaTrained(model, file.heads, file.paths, file.ranks, name, own=True)


# The result of the probe, cached per module: an empty text if there is no problem.
_problems: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def hidden_problem(model: LanguageModel) -> str | None:
    """Why the last hidden state isn't what the LM head reads, None if it is.

    Found out once per model: the LM head on the states must rank first what the logits
    rank first. Scaled or capped logits pass, since order is all that heads learn.
    """
    if model.model not in _problems:
        _problems[model.model] = _probe(model) or ""
    return _problems[model.model] or None


@torch.inference_mode()
def _probe(model: LanguageModel) -> str | None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, model.vocab_size, (PROBE_TOKENS,), generator=generator)
    try:
        forward = model.prefill(
            drawn.tolist(),
            model.new_cache(PROBE_TOKENS),
            last=PROBE_TOKENS,
            hidden_layers=(-1,),
        )
        hidden = forward.hidden[-1]
        ours = lm_head_of(model)(hidden).float()
    except Exception as error:  # a model's own code may raise anything
        first = (str(error).splitlines() or [repr(error)])[0]
        return f"{model.name} doesn't give the hidden states its LM head reads: {first}"
    theirs = forward.logits.float()
    if ours.shape != theirs.shape:
        return (
            f"{model.name}'s last hidden states give logits {list(ours.shape)} "
            f"for its own {list(theirs.shape)}"
        )
    top = theirs.max(-1).values
    short = top - theirs.gather(1, ours.argmax(-1, keepdim=True))[:, 0]
    reach = top - theirs.min(-1).values
    if bool((short > ROUNDING_SHARE * reach).any()) or not bool(
        theirs.isfinite().all()
    ):
        return (
            f"{model.name}'s last hidden states aren't what its LM head reads: the "
            "likeliest tokens differ"
        )
    return None


def lm_head_of(model: LanguageModel) -> nn.Module:
    """The target's, as the engine runs it."""
    head: nn.Module = model.model.get_output_embeddings()  # type: ignore[operator]
    return head
