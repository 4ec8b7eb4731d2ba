"""Small GGUF files, written for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: tuple[str, ...] = ("token_embd.weight",),
    file_type: LlamaFileType = LlamaFileType.MOSTLY_Q4_K_M,
    template: str | None = "{{ messages }}",
    seed: int = 0,
    **numbers: Any,
) -> Path:
    """A file with random tensors; ``numbers`` are values of the architecture."""
    writer = GGUFWriter(path, architecture)
    writer.add_file_type(file_type)
    writer.add_token_list(["a", "b", "c"])
    if template is not None:
        writer.add_chat_template(template)
    for name, value in numbers.items():
        key = name.replace("__", ".")
        writer.add_uint32(f"{architecture}.{key}", value)
    random = np.random.default_rng(seed)
    for name in tensors:
        writer.add_tensor(name, random.normal(size=(4, 8)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
