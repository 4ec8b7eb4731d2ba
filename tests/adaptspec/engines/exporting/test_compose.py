"""A command becomes a container's arguments, and models its volumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from adaptspec.engines.exporting.compose import compose_text
from adaptspec.engines.exporting.measured import choices_of, found_here
from adaptspec.engines.exporting.plan import Plan, for_mix
from adaptspec.engines.inference_engine import Launch
from adaptspec.errors import EngineError
from adaptspec_profiles.memory import MemoryStore
from measured_engines import HERE, keep_run


def plan_of(command: list[str]) -> Plan:
    store = MemoryStore()
    keep_run(store, {"a": (1.0, {("ngram_simple", 4): 1.5})})
    found = found_here(store, choices_of(store, "llama.cpp", None), HERE)
    return for_mix(found, {}, lambda setting: Launch(command), 8000)


def service_of(command: list[str], engine: str, *files: str) -> dict[str, object]:
    text = compose_text(plan_of(command), engine, "127.0.0.1", "image:1", files)
    (service,) = yaml.safe_load(text)["services"].values()
    return dict(service)


@pytest.mark.parametrize(
    ("command", "engine"),
    [
        (["llama-server", "-m", "M", "-c", "10"], "llama.cpp"),
        (["/opt/x/llama-server", "-m", "M", "-c", "10"], "llama.cpp"),
        (["vllm", "serve", "-m", "M", "-c", "10"], "vllm"),
        (["/v/bin/python", "-m", "vllm.cli", "serve", "-m", "M", "-c", "10"], "vllm"),
        (["python3", "-m", "api", "--model", "-m", "M", "-c", "10"], "vllm"),
        (["python3.11", "-m", "sglang", "-m", "M", "-c", "10"], "sglang"),
    ],
)
def test_the_images_own_program_takes_the_arguments(
    command: list[str], engine: str
) -> None:
    service = service_of(command, engine)
    words = ["-m", "M", "-c", "10", "--host", "0.0.0.0", "--port", "8000"]
    assert service["command"] == words


def test_a_folders_links_are_mounted_where_they_lead(tmp_path: Path) -> None:
    """As the hub's cache has them."""
    folder, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_text("weights")
    (folder / "model.safetensors").symlink_to(blobs / "x")
    (folder / "config.json").write_text("{}")
    service = service_of(["vllm", "serve", "M"], "vllm", str(folder))
    assert service["volumes"] == [f"{path}:{path}:ro" for path in (folder, blobs)]


def test_all_parts_of_a_divided_file_are_mounted(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    names = ["m(1)-00001-of-00002.gguf", "m(1)-00002-of-00002.gguf"]
    for name in [*names, "m-00001-of-00002.gguf", "m(1)-00001-of-00003.gguf"]:
        (tmp_path / name).symlink_to(blobs / name)
        (blobs / name).write_text("weights")
    service = service_of(["llama-server"], "llama.cpp", str(tmp_path / names[0]))
    paths = [folder / name for name in names for folder in (tmp_path, blobs)]
    assert sorted(service["volumes"]) == sorted(f"{p}:{p}:ro" for p in paths)  # type: ignore[call-overload]


def test_a_model_of_the_hub_brings_this_users_cache_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not another folder: the engine isn't to ask the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/cache/hub")
    service = service_of(["vllm", "serve", "org/model"], "vllm", "org/model")
    assert service["volumes"] == ["/cache/hub:/root/.cache/huggingface/hub"]


def test_where_no_image_is_published_one_must_be_named() -> None:
    with pytest.raises(
        EngineError, match=r"no image of vllm is known for cpu.*--image"
    ):
        compose_text(plan_of(["vllm", "serve"]), "vllm", "127.0.0.1", None, [])
