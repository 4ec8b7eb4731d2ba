"""Medusa heads on disk: every layout in use is read, the one that fits is written.

Layouts are told apart by the names of the tensors, never by ``config.json``, whose
counts are wrong in checkpoints that many people use.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from adaptspec.errors import HeadsLoadError
from adaptspec.heads.measured_paths import (
    CALIBRATION,
    KIND,
    Paths,
    Ranks,
    read_calibration,
    read_json,
    write_json,
)
from adaptspec.heads.medusa import MedusaHeads, Output
from adaptspec.heads.tensors import (
    WEIGHT_FILES,
    TensorFiles,
    find_weights,
    write_tensors,
)
from adaptspec.model.weights import weights_digest

# v1: the reference's, each head with an LM head of its own. v2: blocks only, the
# target's LM head. model: v1 or v2 inside a full model. vllm: vLLM's.
Format = Literal["v1", "v2", "model", "vllm"]

_INSIDE = re.compile(r"medusa_head\.")
_PREFIX = re.compile(r"^medusa_heads?\.")
_BLOCK = re.compile(r"^(\d+)\.(\d+)\.linear\.(weight|bias)$")
_OUTPUT = re.compile(r"^(\d+)\.(\d+)\.weight$")
_VLLM_BLOCK = re.compile(r"^blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)$")
_VLLM_OUTPUT = re.compile(r"^lm_heads\.(\d+)\.weight$")


@dataclass(frozen=True)
class HeadsFile:
    """Heads and what is known of them.

    Args:
        heads: In the type they are stored in.
        paths: Calibrated rank paths, best first, each with the measured chance that
            all of it is right; None if nothing was measured.
        ranks: ``ranks[k][r]`` is how often rank ``r`` of head ``k + 1`` was right.
        digest: Fingerprint of weights and calibration.
        format: The layout.
        base: The target's name, as the file gives it.
    """

    heads: MedusaHeads
    paths: Paths | None
    ranks: Ranks | None
    digest: str
    format: Format
    base: str | None


def read_heads(folder: Path, hidden_size: int, vocab_size: int) -> HeadsFile:
    """Read heads for a target of ``hidden_size`` and ``vocab_size``.

    Raises:
        HeadsLoadError: naming the file, or the tensor with its shape, that is missing,
            unexpected, damaged or doesn't fit the target.
    """
    files = find_weights(folder)
    layout = _Layout.of(files, hidden_size, vocab_size)
    heads = layout.build()
    found = read_calibration(folder, _fingerprint(heads), heads)
    paths, ranks = found or (None, None)
    config = read_json(folder / "config.json") or {}
    base = config.get("base_model_name_or_path")
    return HeadsFile(
        heads=heads,
        paths=paths,
        ranks=ranks,
        digest=digest_of(heads, paths, ranks),
        format=layout.format,
        base=base if isinstance(base, str) else None,
    )


def write_heads(
    folder: Path,
    heads: MedusaHeads,
    *,
    base_model: str,
    vocab_size: int,
    paths: Paths | None,
    ranks: Ranks | None,
    record: Mapping[str, Any],
) -> None:
    """Write heads as others' loaders of the fitting layout read them.

    Weights go last, and the calibration names their fingerprint: a process killed
    half-way leaves no pair that looks whole and isn't.

    Args:
        base_model: The target's name or path, for people and for other loaders.
        vocab_size: The target's, also where the heads' is reduced.
        record: How they were trained; kept as it is.

    Raises:
        HeadsLoadError: if the folder holds weights that aren't these heads'.
    """
    tensors, layout = _named(heads)
    name = "model.safetensors" if layout == "vllm" else "medusa_lm_head.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    others = check_folder(folder)
    calibration = {
        "version": 1,
        "kind": KIND,
        "weights": _fingerprint(heads),
        "paths": None if paths is None else [[list(p), c] for p, c in paths],
        "ranks": None if ranks is None else [list(row) for row in ranks],
        "training": dict(record),
    }
    write_json(folder / CALIBRATION, calibration)
    config = _config(heads, layout, base_model, vocab_size, paths)
    write_json(folder / "config.json", config)
    write_tensors(folder / name, tensors)
    for other in others:
        if other != name:
            (folder / other).unlink()


def check_folder(folder: Path) -> list[str]:
    """The weights in ``folder`` that writing heads would replace.

    Raises:
        HeadsLoadError: if they aren't heads that AdaptSpec wrote.
    """
    others = [other for other in WEIGHT_FILES if (folder / other).exists()]
    if others and not (folder / CALIBRATION).exists():
        raise HeadsLoadError(
            f"{folder / others[0]} isn't AdaptSpec's and would be hidden or replaced; "
            "give another folder for the heads"
        )
    return others


class _Layout:
    """What the names of the tensors say, checked against the target."""

    def __init__(
        self,
        files: TensorFiles,
        names: Mapping[str, str],
        format: Format,
        blocks: Mapping[tuple[int, int, str], str],
        outputs: Mapping[int, str],
        joint: str | None,
        token_map: str | None,
        hidden_size: int,
        vocab_size: int,
    ) -> None:
        self.format: Format = format
        self._files, self._names = files, names
        self._blocks, self._outputs = blocks, outputs
        self._joint, self._token_map = joint, token_map
        self._hidden, self._vocab = hidden_size, vocab_size

    @classmethod
    def of(cls, files: TensorFiles, hidden_size: int, vocab_size: int) -> _Layout:
        """Sort the tensors; names that belong to no layout are refused."""
        inside = [name for name in files.names if _INSIDE.match(name)]
        # The rest of a full model is the target itself.
        chosen = inside or files.names
        names = {_PREFIX.sub("", name): name for name in chosen}
        blocks: dict[tuple[int, int, str], str] = {}
        outputs: dict[tuple[int, int], str] = {}
        joint = token_map = None
        vllm = False
        unexpected = []
        for short in sorted(names):
            if found := _VLLM_BLOCK.match(short):
                blocks[int(found[1]), int(found[2]), found[3]] = short
                vllm = True
            elif found := _BLOCK.match(short):
                blocks[int(found[1]), int(found[2]), found[3]] = short
            elif found := _VLLM_OUTPUT.match(short):
                outputs[int(found[1]), -1] = short
            elif found := _OUTPUT.match(short):
                outputs[int(found[1]), int(found[2])] = short
            elif short == "lm_head.weight":
                joint = short
            elif short == "token_map":
                token_map = short
            else:
                unexpected.append(short)
        if not blocks:
            raise HeadsLoadError(
                f"{files.where} holds no Medusa heads: none of its {len(files.names)} "
                "tensors is named like one (0.0.linear.weight, "
                "medusa_head.0.0.linear.weight, blocks.0.layers.0.weight)"
            )
        mixed = [short for short in sorted(names) if vllm != _is_vllm(short)]
        if unexpected or mixed:
            raise files.refusal(
                names[(unexpected or mixed)[0]], "is not part of the heads' layout"
            )
        layers = 1 + max(layer for _, layer, _ in blocks)
        by_head: dict[int, str] = {}
        for (head, place), short in outputs.items():
            if place not in (-1, layers):
                raise files.refusal(
                    names[short],
                    f"must be named {head}.{layers}.weight after {layers} blocks",
                )
            by_head[head] = short
        if vllm and len({h for h, _, _ in blocks}) > 1 and set(by_head) == {0}:
            # vLLM's loader takes this for all heads where they share one.
            joint, by_head = by_head[0], {}
        format: Format = "vllm" if vllm else "v1" if outputs else "v2"
        return cls(
            files,
            names,
            "model" if inside else format,
            blocks,
            by_head,
            joint,
            token_map,
            hidden_size,
            vocab_size,
        )

    def build(self) -> MedusaHeads:
        """The module with the tensors in it.

        Raises:
            HeadsLoadError: for what is missing or doesn't fit.
        """
        count = len({head for head, _, _ in self._blocks})
        layers = len({layer for _, layer, _ in self._blocks})
        bias = any(kind == "bias" for _, _, kind in self._blocks)
        self._complete(count, layers, bias)
        state = {}
        for (head, layer, kind), short in self._blocks.items():
            shape = (self._hidden, self._hidden)[: 2 if kind == "weight" else 1]
            state[f"blocks.{head}.{layer}.linear.{kind}"] = self._get(short, shape)
        token_map = self._read_token_map()
        rows = self._vocab if token_map is None else len(token_map)
        shared: dict[int, str] = {0: self._joint} if self._joint else {}
        for index, short in (self._outputs or shared).items():
            state[f"outputs.{index}.weight"] = self._read_output(short, token_map)
        output: Output = (
            "own" if self._outputs else "joint" if self._joint is not None else "base"
        )
        if token_map is not None:
            state["token_map"] = token_map
        dtypes = {str(t.dtype) for name, t in state.items() if name != "token_map"}
        if len(dtypes) > 1:
            raise HeadsLoadError(
                f"{self._files.where}: tensors must have one type, "
                f"got {', '.join(sorted(dtypes))}"
            )
        with torch.device("meta"):
            heads = MedusaHeads(
                self._hidden, rows, count, layers, output, token_map, bias
            )
        heads.load_state_dict(state, assign=True)
        return heads.requires_grad_(False).eval()

    def _complete(self, count: int, layers: int, bias: bool) -> None:
        vllm = any(_is_vllm(short) for short in self._blocks.values())
        for head in range(count):
            for layer in range(layers):
                for kind in ("weight", "bias") if bias else ("weight",):
                    if (head, layer, kind) not in self._blocks:
                        name = (
                            f"blocks.{head}.layers.{layer}.{kind}"
                            if vllm
                            else f"{head}.{layer}.linear.{kind}"
                        )
                        raise self._missing(name, count, layers)
            if self._outputs and head not in self._outputs:
                name = f"lm_heads.{head}.weight" if vllm else f"{head}.{layers}.weight"
                raise self._missing(name, count, layers)
        if extra := sorted(set(self._outputs) - set(range(count))):
            name = self._names[self._outputs[extra[0]]]
            raise self._files.refusal(name, f"belongs to none of the {count} heads")
        if vllm and not self._outputs and self._joint is None:
            raise self._missing("lm_heads.0.weight", count, layers)

    def _missing(self, name: str, count: int, layers: int) -> HeadsLoadError:
        return HeadsLoadError(
            f"{self._files.where} lacks {name}, which its other tensors ask for "
            f"({count} heads of {layers} blocks); copy the whole checkpoint"
        )

    def _get(self, short: str, *shapes: tuple[int, ...]) -> torch.Tensor:
        name = self._names[short]
        found = self._files.shape(name)
        if found not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self._files.refusal(
                name,
                f"is {list(found)}, and {expected} is needed for a target of hidden "
                f"size {self._hidden} and {self._vocab} tokens; give the heads that "
                "were trained for this model",
            )
        tensor = self._files.get(name)
        if not tensor.is_floating_point():
            raise self._files.refusal(
                name, f"must hold floating-point numbers, got {tensor.dtype}"
            )
        return tensor

    def _read_output(self, short: str, token_map: torch.Tensor | None) -> torch.Tensor:
        whole = (self._vocab, self._hidden)
        if token_map is None:
            return self._get(short, whole)
        tensor = self._get(short, (len(token_map), self._hidden), whole)
        # vLLM reduces a whole LM head when it loads it, too.
        return tensor if len(tensor) == len(token_map) else tensor[token_map]

    def _read_token_map(self) -> torch.Tensor | None:
        if self._token_map is None:
            return None
        name = self._names[self._token_map]
        shape = self._files.shape(name)
        if len(shape) != 1 or not 1 <= shape[0] <= self._vocab:
            raise self._files.refusal(
                name, f"must list up to {self._vocab} tokens, got {list(shape)}"
            )
        tokens = self._files.get(name)
        if tokens.is_floating_point() or tokens.is_complex():
            raise self._files.refusal(name, f"must hold integers, got {tokens.dtype}")
        tokens = tokens.long()
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._vocab:
            raise self._files.refusal(
                name,
                f"must hold token ids in 0..{self._vocab - 1}, "
                f"got {int(tokens.min())}..{int(tokens.max())}",
            )
        if len(set(tokens.tolist())) != len(tokens):
            raise self._files.refusal(name, "must hold each token once")
        return tokens


def _is_vllm(short: str) -> bool:
    return short.startswith(("blocks.", "lm_head", "token_map"))


def _named(heads: MedusaHeads) -> tuple[dict[str, torch.Tensor], Format]:
    """The tensors under their names in the layout that fits the heads."""
    vllm = heads.output == "joint" or heads.token_map is not None
    state = heads.state_dict()
    named = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "blocks" and vllm:
            head, layer, _, kind = rest.split(".")
            named[f"blocks.{head}.layers.{layer}.{kind}"] = tensor
        elif part == "blocks":
            named[rest] = tensor
        elif part == "outputs":
            index = rest.split(".")[0]
            key = f"lm_heads.{index}" if vllm else f"{index}.{heads.layers}"
            named[f"{key}.weight"] = tensor
        else:
            named[name] = tensor
    return named, "vllm" if vllm else "v1" if heads.output == "own" else "v2"


def _config(
    heads: MedusaHeads,
    layout: Format,
    base_model: str,
    vocab_size: int,
    paths: Paths | None,
) -> dict[str, Any]:
    """What the loaders of TGI, vLLM and the reference read, with the true counts."""
    count = len(heads.blocks)
    bias = heads.blocks[0][0].linear.bias is not None  # type: ignore[index]
    config: dict[str, Any] = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": base_model,
        "medusa_num_heads": count,
        "medusa_num_layers": heads.layers,
        "num_heads": count,
        "num_hidden_layers": heads.layers,
        "hidden_size": heads.hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": heads.draft_vocab if layout == "vllm" else vocab_size,
        "original_lm_head": heads.output == "joint",
        "medusa_fc_bias": bias,
        "torch_dtype": str(next(heads.parameters()).dtype).removeprefix("torch."),
    }
    if layout == "v2":
        config["version"] = "2"
    if paths is not None:
        config["medusa_choices"] = [list(path) for path, _ in paths]
    return config


def _fingerprint(heads: MedusaHeads) -> str:
    digest = hashlib.sha256(weights_digest(heads).encode())
    if heads.token_map is not None:
        digest.update(heads.token_map.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of(heads: MedusaHeads, paths: Paths | None, ranks: Ranks | None) -> str:
    """The calibration counts too: it decides the trees, and so the speed."""
    told: Sequence[Any] = (_fingerprint(heads), paths, ranks)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
