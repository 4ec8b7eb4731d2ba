"""What a Hugging Face folder tells of its model without loading it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptspec.errors import EngineError

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
SAMPLES = 64
SAMPLE_BYTES = 4096
# Each family's name for the layers that predict further tokens.
MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}


@dataclass(frozen=True)
class ModelFolder:
    """A folder with ``config.json`` and weights.

    Args:
        given: Its path, or its name on the hub.
        path: Where it is.
    """

    given: str
    path: Path

    @classmethod
    def find(cls, given: str) -> ModelFolder:
        """A folder, or a name on the Hugging Face hub that was downloaded before.

        Raises:
            EngineError: if there is neither, or no configuration in it.
        """
        path = Path(given).expanduser()
        if path.suffix == ".gguf" and path.is_file():
            raise EngineError(
                f"{given} is a GGUF file, a Hugging Face folder is expected; "
                "`--engine llama.cpp` takes it"
            )
        found = (
            cls(str(path), path) if path.is_dir() else cls(given, _downloaded(given))
        )
        _ = found.config
        return found

    @property
    def name(self) -> str:
        """For people."""
        path = Path(self.given)
        return path.resolve().name if path.is_dir() else self.given

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """``config.json``."""
        file = self.path / "config.json"
        try:
            read = json.loads(file.read_text())
        except FileNotFoundError:
            raise EngineError(
                f"{self.given}: no config.json; a Hugging Face folder has one"
            ) from None
        except (OSError, ValueError) as error:
            raise EngineError(f"{file}: can't be read: {error}") from None
        if not isinstance(read, dict):
            raise EngineError(f"{file}: an object is expected")
        return read

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Of the part that generates text, where the model has others."""
        inner = self.config.get("text_config") or self.config.get("llm_config")
        return inner if isinstance(inner, Mapping) else self.config

    @functools.cached_property
    def weights(self) -> tuple[Path, ...]:
        """Its files of weights, of one format."""
        for pattern in WEIGHTS:
            if files := sorted(self.path.glob(pattern)):
                return tuple(files)
        return ()

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(file.stat().st_size for file in self.weights)

    @functools.cached_property
    def digest(self) -> str:
        """A fingerprint of configuration and weights, from samples of every file."""
        digest = hashlib.sha256(self.configuration.encode())
        for file in self.weights:
            size = file.stat().st_size
            digest.update(f"{file.name}{size}".encode())
            with file.open("rb") as opened:
                for place in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                    opened.seek(place)
                    digest.update(opened.read(SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    @property
    def configuration(self) -> str:
        """A fingerprint of the configuration, as far as it decides what is computed."""
        untold = ("_name_or_path", "_model_name_or_path", "transformers_version")
        told = {k: v for k, v in self.config.items() if k not in untold}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[
            :16
        ]

    @property
    def dtype(self) -> str:
        """As the weights are stored: ``bfloat16``, ``float16`` or ``float32``."""
        for config in (self.config, self.text_config):
            told = config.get("dtype") or config.get("torch_dtype")
            if isinstance(told, str) and told.removeprefix("torch.") in EPSILON:
                return told.removeprefix("torch.")
        stored = {_stored_type(file) for file in self.weights[:1]}
        return {"BF16": "bfloat16", "F16": "float16"}.get(next(iter(stored), ""), "")

    @property
    def longest(self) -> int | None:
        """Positions that the model knows."""
        told = self.text_config.get("max_position_embeddings")
        return int(told) if told else None

    @property
    def vocab_size(self) -> int | None:
        """Rows of its embedding."""
        told = self.text_config.get("vocab_size")
        return int(told) if told else None

    @property
    def mtp_layers(self) -> int:
        """Layers in the checkpoint that predict further tokens; 0: none."""
        configs = (self.config, self.text_config)
        told = [c.get(name) for c in configs for name in MTP_LAYERS]
        return next((int(n) for n in told if n), 0)

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of ``tokens`` positions, with two bytes an element."""
        config = self.text_config
        layers = int(config.get("num_hidden_layers") or 0)
        heads = int(config.get("num_attention_heads") or 1)
        kept = int(config.get("num_key_value_heads") or heads)
        size = config.get("head_dim") or int(config.get("hidden_size") or 0) // heads
        return 2 * 2 * layers * kept * int(size) * tokens

    def reads_otherwise(self, other: ModelFolder) -> str | None:
        """Why the token ids of ``other`` mean something else here, or None."""
        if self.vocab_size != other.vocab_size:
            return (
                f"{other.name} has a vocabulary of {other.vocab_size} tokens, "
                f"{self.name} one of {self.vocab_size}"
            )
        mine, theirs = self._vocabulary(), other._vocabulary()
        if mine is not None and theirs is not None and mine != theirs:
            return f"{other.name} gives other ids to its tokens than {self.name}"
        return None

    def _vocabulary(self) -> Any:
        file = self.path / "tokenizer.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        raise EngineError(
            f"no model {name!r}: neither a folder nor in the Hugging Face cache; check "
            f"the path, or download it first with `hf download {name}`"
        ) from None


def _stored_type(file: Path) -> str:
    """Of most tensors of a safetensors file; empty of another format."""
    if file.suffix != ".safetensors":
        return ""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    types = [t["dtype"] for name, t in header.items() if name != "__metadata__"]
    return max(set(types), key=types.count) if types else ""
