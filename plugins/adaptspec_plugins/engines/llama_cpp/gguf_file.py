"""What a GGUF file holds: its fingerprint, its weights' type, what kind of draft."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptspec.errors import EngineError

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
HASH_BYTES = 1 << 22
CACHE_FORMAT = 2
OUR_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GgufFile:
    """A model file, or the parts of one.

    Args:
        path: The file, or the first of its parts.
        size: Bytes, of all parts.
        digest: SHA-256 of all bytes, shortened.
        metadata: Its single values, without the vocabulary and the chat template.
        has_template: Whether a chat template comes with it.
        has_markov_head: Whether its blocks are corrected by a Markov head (DSpark).
    """

    path: Path
    size: int
    digest: str
    metadata: Mapping[str, Any]
    has_template: bool
    has_markov_head: bool

    @property
    def name(self) -> str:
        """Its name for people."""
        return PART.sub("", self.path.name).removesuffix(".gguf")

    @property
    def architecture(self) -> str:
        """``llama``, ``qwen2``, ``eagle3``..."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def dtype(self) -> str:
        """The type of most weights: ``bfloat16``, ``Q4_K_M``..."""
        from gguf import LlamaFileType

        try:
            kind = LlamaFileType(self.metadata["general.file_type"]).name
        except (KeyError, ValueError):
            return "unknown"
        kind = kind.removeprefix("MOSTLY_").removeprefix("ALL_")
        return OUR_NAMES.get(kind, kind)

    def number(self, key: str) -> int:
        """A value of its architecture, e.g. ``block_count``; 0 where it has none."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        return int(value) if isinstance(value, int | float) else 0

    @property
    def predicts_ahead(self) -> bool:
        """Whether it has layers that predict several tokens (MTP)."""
        return self.number("nextn_predict_layers") > 0

    @property
    def draft_kind(self) -> str:
        """The method that drafts with it, by what llama.cpp itself looks at."""
        if self.architecture == "eagle3":
            return "draft_eagle3"
        if self.architecture == "dflash":
            return "draft_dspark" if self.has_markov_head else "draft_dflash"
        return "draft_mtp" if self.predicts_ahead else "draft_simple"

    def cache_bytes(self, tokens: int) -> int:
        """About what keys and values of ``tokens`` take, in half precision."""
        heads = self.number("attention.head_count") or 1
        width = self.number("attention.key_length") or (
            self.number("embedding_length") // heads
        )
        kept = self.number("attention.head_count_kv") or heads
        return 2 * 2 * tokens * self.number("block_count") * kept * width

    @property
    def caches_all(self) -> bool:
        """Whether every layer keeps keys and values of all tokens, so that
        :meth:`cache_bytes` isn't too much, as far as the metadata tell."""
        others = [
            *("attention.sliding_window", "attention.key_length_mla"),
            *("full_attention_interval", "ssm.state_size"),
        ]
        told = self.number("attention.head_count_kv")  # 0 also where layers differ
        return told > 0 and not any(self.number(key) for key in others)

    @classmethod
    def open(cls, path: str | Path, cache: Path | None = None) -> GgufFile:
        """Read a file; what was read is kept, as reading all of it takes seconds.

        Args:
            cache: Folder of what was read of unchanged files; None: AdaptSpec's.

        Raises:
            EngineError: where it isn't there or isn't a GGUF file.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "isn't there"
            raise EngineError(
                f"llama.cpp: a model is a GGUF file, but {path} {what}; "
                "llama.cpp's convert_hf_to_gguf.py makes one of a model's folder"
            )
        # Where links lead, as in the hub's cache, files needn't have these names.
        path = path.absolute()
        parts = _parts(path)
        state: list[list[Any]] = [
            [str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in parts
        ]
        kept = _cache_file(path, cache)
        known = _read_cache(kept, state)
        if known is None:
            known = {**_contents(parts), "digest": _digest(parts)}
            _write_cache(kept, {"format": CACHE_FORMAT, "state": state, "known": known})
        return cls(path=path, size=sum(size for _, size, _ in state), **known)


def _parts(path: Path) -> list[Path]:
    """All parts of a file that is divided, else the file alone."""
    if (found := PART.search(path.name)) is None:
        return [path]
    count = int(found.group(2))
    stem = path.name[: found.start()]
    parts = [
        path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf")
        for i in range(1, count + 1)
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise EngineError(
            f"llama.cpp: {path} is one of {count} parts; missing: {missing[0]}"
        )
    return parts


def _contents(parts: list[Path]) -> dict[str, Any]:
    """The metadata are the first part's; the tensors lie in all of them."""
    read = [_read(part) for part in parts]
    metadata = read[0][0]
    tensors = {name for _, names in read for name in names}
    has_template = metadata.pop("tokenizer.chat_template", None) is not None
    return {
        "metadata": metadata,
        "has_template": has_template,
        "has_markov_head": "markov_w1.weight" in tensors,
    }


def _read(path: Path) -> tuple[dict[str, Any], set[str]]:
    """A file's single values, and the names of its tensors."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        values = {name: _single(field) for name, field in reader.fields.items()}
        tensors = {str(tensor.name) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise EngineError(f"llama.cpp: {path} is not a GGUF file: {error}") from error
    return {n: value for n, value in values.items() if value is not None}, tensors


def _single(field: Any) -> Any:
    """A field's value; None for a list."""
    from gguf import GGUFValueType

    if len(field.types) != 1:
        return None
    value = field.parts[field.data[0]]
    if field.types[0] == GGUFValueType.STRING:
        return bytes(value).decode("utf-8", errors="replace")
    return value[0].item()


def _digest(parts: list[Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]


def _cache_file(path: Path, folder: Path | None) -> Path:
    if folder is None:
        from adaptspec.cache_folder import cache_root

        folder = cache_root() / "gguf"
    return folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.json"


def _read_cache(path: Path, state: list[list[Any]]) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("format") != CACHE_FORMAT:
        return None
    return kept["known"] if kept.get("state") == state else None


def _write_cache(path: Path, content: Mapping[str, Any]) -> None:
    """Without it, the next start reads the file again: no reason to fail."""
    import os

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(content))
        new.replace(path)
