"""What is read of a model file, and that it is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from adaptspec.errors import EngineError
from adaptspec_plugins.engines.llama_cpp.gguf_file import GgufFile
from gguf_files import write_gguf


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_name_type_and_cache_size_are_read(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(
        tmp_path / "small.gguf",
        block_count=3,
        attention__head_count=8,
        attention__head_count_kv=2,
        embedding_length=64,
    )
    file = GgufFile.open(path, cache)
    assert (file.name, file.dtype, file.has_template) == ("small", "Q4_K_M", True)
    assert file.size == path.stat().st_size
    # Keys and values, two bytes, three layers of two heads of eight numbers.
    assert file.cache_bytes(10) == 2 * 2 * 3 * 2 * 8 * 10


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (gguf.LlamaFileType.MOSTLY_BF16, "bfloat16"),
        (gguf.LlamaFileType.MOSTLY_F16, "float16"),
        (gguf.LlamaFileType.ALL_F32, "float32"),
        (gguf.LlamaFileType.MOSTLY_Q8_0, "Q8_0"),
    ],
)
def test_types_are_called_as_ours_where_they_are_the_same(
    kind: gguf.LlamaFileType, name: str, tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(tmp_path / "f.gguf", file_type=kind)
    assert GgufFile.open(path, cache).dtype == name


@pytest.mark.parametrize(
    ("architecture", "numbers", "tensors", "kind"),
    [
        ("llama", {}, ("token_embd.weight",), "draft_simple"),
        ("eagle3", {}, ("fc.weight",), "draft_eagle3"),
        ("dflash", {}, ("fc.weight",), "draft_dflash"),
        ("dflash", {}, ("fc.weight", "markov_w1.weight"), "draft_dspark"),
        ("glm4moe", {"nextn_predict_layers": 1}, ("fc.weight",), "draft_mtp"),
        ("glm4moe", {"nextn_predict_layers": 0}, ("fc.weight",), "draft_simple"),
    ],
)
def test_what_a_file_drafts_as(
    architecture: str,
    numbers: dict[str, Any],
    tensors: tuple[str, ...],
    kind: str,
    tmp_path: Path,
    cache: Path,
) -> None:
    path = write_gguf(tmp_path / "f.gguf", architecture, tensors, **numbers)
    assert GgufFile.open(path, cache).draft_kind == kind


def test_tensors_of_every_part_are_looked_at(tmp_path: Path, cache: Path) -> None:
    """And metadata of the first, which has all of them."""
    parts = [tmp_path / f"d-0000{number}-of-00002.gguf" for number in (1, 2)]
    write_gguf(parts[0], "dflash", block_count=2)
    write_gguf(parts[1], "dflash", ("markov_w1.weight",), block_count=9)
    file = GgufFile.open(parts[0], cache)
    assert file.draft_kind == "draft_dspark"
    assert file.number("block_count") == 2


def test_an_unchanged_file_is_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "f.gguf", template=None, block_count=2)
    first = GgufFile.open(path, cache)
    with monkeypatch.context() as patched:
        patched.delattr(gguf, "GGUFReader")
        assert GgufFile.open(path, cache) == first
    write_gguf(path, block_count=2, seed=1, template=None)
    second = GgufFile.open(path, cache)
    assert second.digest != first.digest
    assert second.metadata == first.metadata


def test_a_broken_cache_is_replaced(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "f.gguf")
    first = GgufFile.open(path, cache)
    (kept,) = cache.iterdir()
    kept.write_text("{")
    assert GgufFile.open(path, cache) == first
    assert kept.read_text() != "{"


def test_without_a_place_for_the_cache_the_file_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "f.gguf")
    (tmp_path / "file").write_text("")
    assert GgufFile.open(path, tmp_path / "file" / "cache").name == "f"


def test_parts_that_are_links_are_found_by_their_names(
    tmp_path: Path, cache: Path
) -> None:
    """As in the hub's cache, whose files are named by what is in them."""
    paths = [tmp_path / f"big-0000{number}-of-00002.gguf" for number in (1, 2)]
    blobs = [write_gguf(tmp_path / f"{number}f.gguf") for number in (1, 2)]
    for path, blob in zip(paths, blobs, strict=True):
        path.symlink_to(blob)
    file = GgufFile.open(paths[0], cache)
    assert (file.path, file.name) == (paths[0], "big")
    assert file.size == sum(blob.stat().st_size for blob in blobs)


def test_all_parts_of_a_divided_file_count(tmp_path: Path, cache: Path) -> None:
    first = write_gguf(tmp_path / "big-00001-of-00002.gguf")
    with pytest.raises(EngineError, match="one of 2 parts; missing: big-00002-of-0000"):
        GgufFile.open(first, cache)
    second = write_gguf(tmp_path / "big-00002-of-00002.gguf")
    both = GgufFile.open(first, cache)
    assert both.name == "big"
    assert both.size == first.stat().st_size + second.stat().st_size
    write_gguf(second, seed=5)
    assert GgufFile.open(first, cache).digest != both.digest


def test_what_is_no_model_file_is_named(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGUF, not quite")
    for path, says in (
        (tmp_path / "text.gguf", "is not a GGUF file"),
        (tmp_path / "absent.gguf", "isn't there; llama.cpp's convert_hf_to_gguf"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(EngineError, match=says) as caught:
            GgufFile.open(path, cache)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
