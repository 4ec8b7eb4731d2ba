"""A command becomes a container's arguments, and models its volumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptspec.engines.exporting.compose import compose_text
from adaptspec.engines.exporting.measured import choices_of, found_here
from adaptspec.engines.exporting.plan import Plan, for_mix
from adaptspec.engines.inference_engine import Launch
from adaptspec.errors import EngineError
from adaptspec.profile import Environment
from adaptspec_profiles.memory import MemoryStore
from measured_engines import HERE, keep_run


def plan_of(command: list[str], here: Environment = HERE) -> Plan:
    store = MemoryStore()
    keep_run(store, {"a": (1.0, {("ngram_simple", 4): 1.5})}, environment=here)
    found = found_here(store, choices_of(store, here.engine, None), here)
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


def exported(engine: str, device: str, version: str) -> tuple[str, dict[str, Any]]:
    here = replace(HERE, engine=engine, device=device, versions={engine: version})
    text = compose_text(plan_of([engine], here), engine, "127.0.0.1", None, [])
    (service,) = yaml.safe_load(text)["services"].values()
    return text, dict(service)


@pytest.mark.parametrize(
    ("version", "tag", "noted"),
    [
        ("0.19.0", "v0.19.0", False),
        ("0.19.0.post1", "v0.19.0.post1", False),
        ("0.19.0+cu130", "v0.19.0", True),
        ("0.19.1.dev7+g1234567.cu130", "latest", True),
    ],
)
def test_a_vllm_image_is_that_of_the_release(
    version: str, tag: str, noted: bool
) -> None:
    """A tag has no "+", and what was built otherwise isn't published."""
    text, service = exported("vllm", "cuda", version)
    assert service["image"] == f"vllm/vllm-openai:{tag}"
    note = f"{tag} isn't the build that was measured, {version}; "
    assert (note in text) == noted


@pytest.mark.parametrize(
    ("device", "tag", "devices"),
    [
        ("cpu", "server", None),
        ("cuda", "server-cuda", None),
        ("rocm", "server-rocm", ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"]),
        ("vulkan", "server-vulkan", ["/dev/dri:/dev/dri"]),
    ],
)
def test_a_llama_cpp_image_is_for_the_device(
    device: str, tag: str, devices: list[str] | None
) -> None:
    text, service = exported("llama.cpp", device, "4321 (abcdef0)")
    assert service["image"] == f"ghcr.io/ggml-org/llama.cpp:{tag}"
    assert service.get("devices") == devices
    assert "isn't the build that was measured, 4321 (abcdef0)" in text
    with pytest.raises(EngineError, match=r"no image .* for sycl; .*--image"):
        exported("llama.cpp", "sycl", "4321")


@pytest.mark.parametrize(
    ("host", "ports"),
    [
        ("127.0.0.1", "127.0.0.1:8000:8000"),
        ("0.0.0.0", "0.0.0.0:8000:8000"),
        ("localhost", "127.0.0.1:8000:8000"),
        ("::1", "[::1]:8000:8000"),
        ("::", "[::]:8000:8000"),
    ],
)
def test_ports_are_open_on_an_address(host: str, ports: str) -> None:
    """Compose takes no name there, and reads colons as its own."""
    text = compose_text(plan_of(["llama-server"]), "llama.cpp", host, None, [])
    (service,) = yaml.safe_load(text)["services"].values()
    assert service["ports"] == [ports]


def test_a_host_without_an_address_is_refused() -> None:
    with pytest.raises(
        EngineError, match=r"--host: .*'no\.such\.invalid' has none here"
    ):
        compose_text(plan_of(["x"]), "llama.cpp", "no.such.invalid", None, [])


def test_what_arguments_name_is_mounted_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a.gguf", "b.gguf", "c.jinja", "d$", "e f.gguf", "near.gguf", "auto"]
    for name in names:
        (tmp_path / name).write_text("weights")
    here = str(tmp_path)
    command = ["llama-server", "-m", "M", "--lora-scaled"]
    command += [
        f"{here}/a.gguf:0.5,{here}/b.gguf:1",
        f"--chat-template-file={here}/c.jinja",
    ]
    command += ["--lora-modules", f'{{"name": "{"x" * 300}", "path": "{here}/d$"}}']
    command += ["--mmproj", f"{here}/e f.gguf", "--lora", "near.gguf", "--log", "/"]
    text = compose_text(plan_of(command), "llama.cpp", "127.0.0.1", "image:1", [])
    (service,) = yaml.safe_load(text)["services"].values()
    paths = [tmp_path / name.replace("$", "$$") for name in names[:5]]
    assert service["volumes"] == [f"{path}:{path}:ro" for path in paths]
    assert "# near.gguf: a container has no such path; tune with the whole path" in text


def test_a_llama_cpp_service_is_asked_at_its_own_port() -> None:
    """Its images ask port 8080 else, and no Python is in them."""
    service = service_of(["llama-server", "-m", "M"], "llama.cpp")
    health = service["healthcheck"]
    assert isinstance(health, dict)
    words = ["CMD", "curl", "-sf", "-o", "/dev/null", "http://127.0.0.1:8000/health"]
    assert health["test"] == words
    assert "healthcheck" not in service_of(["vllm", "serve", "M"], "vllm")
