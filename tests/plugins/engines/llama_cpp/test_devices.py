"""Which accelerators a server is told, by any of the names that a user may give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from adaptspec.errors import EngineError
from adaptspec_plugins.engines.llama_cpp.devices import elsewhere, family, named, used
from adaptspec_plugins.engines.llama_cpp.engine import LlamaCpp

CUDA = [("CUDA0", "NVIDIA H200"), ("CUDA1", "NVIDIA H200"), ("Vulkan0", "AMD Radeon")]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, None),
        ("cpu", "none"),
        ("none", "none"),
        ("cuda", "CUDA0"),
        ("cuda:1", "CUDA1"),
        ("cuda:0,cuda:1", "CUDA0,CUDA1"),
        ("CUDA0, vulkan0", "CUDA0,Vulkan0"),
    ],
)
def test_a_device_is_told_by_the_servers_own_name(
    given: str | None, told: str | None
) -> None:
    assert named(given, CUDA) == told


@pytest.mark.parametrize("given", ["cuda:2", "cuda:x", "gpu", "CUDA0,", "mps"])
def test_another_one_is_refused_with_the_names_that_there_are(given: str) -> None:
    with pytest.raises(
        EngineError, match=r"\(CUDA0, CUDA1, Vulkan0\), got '.*'; leave"
    ):
        named(given, CUDA)
    with pytest.raises(EngineError, match=r"shows \(none\), got"):
        named(given, [])


@pytest.mark.parametrize(
    ("device", "arguments", "names"),
    [
        (None, [], ["CUDA0", "CUDA1", "Vulkan0"]),
        ("CUDA0,CUDA1", [], ["CUDA0", "CUDA1"]),
        ("none", [], []),
        (None, ["--device", "CUDA1,cuda0"], ["CUDA0", "CUDA1"]),
        (None, ["--device", "none"], []),
        (None, ["--device=none"], []),
        (None, ["-dev", "none"], []),
        (None, ["-ngl", "0"], []),
        (None, ["--n_gpu_layers=0"], []),
        (None, ["--n-gpu-layers", "10"], ["CUDA0", "CUDA1", "Vulkan0"]),
        ("CUDA0", ["--device", "CUDA1"], ["CUDA1"]),
    ],
)
def test_those_that_hold_layers_are_known(
    device: str | None, arguments: Sequence[str], names: Sequence[str]
) -> None:
    assert [name for name, _ in used(device, arguments, CUDA)] == names


def test_a_kind_of_device_has_no_number() -> None:
    assert [family(name) for name, _ in CUDA] == ["cuda", "cuda", "vulkan"]


@pytest.mark.slow
def test_several_devices_are_no_cpu(
    open_engine: Callable[..., LlamaCpp], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "CUDA0: NVIDIA H200 (1 MiB, 1 MiB free)\n  CUDA1: NVIDIA A10"
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", listed)
    engine = open_engine(device="cuda:0,cuda:1")
    environment = engine.environment
    assert environment.device == "cuda"
    assert environment.device_name == "NVIDIA H200, NVIDIA A10"
    assert (engine.room, engine.thread_counts) == (1, ())
    command = list(engine.launch("autoregressive", {}).command)
    assert command[command.index("--device") + 1] == "CUDA0,CUDA1"


@pytest.mark.parametrize(
    ("device", "names"),
    [
        (None, []),
        ("cpu", []),
        ("none", []),
        ("cuda:1", []),
        ("cuda:2,vulkan0, SYCL0", ["CUDA2", "SYCL0"]),
    ],
)
def test_devices_of_another_machine_are_those_that_are_not_listed(
    device: str | None, names: Sequence[str]
) -> None:
    assert elsewhere(device, CUDA) == [(name, f"no {name}") for name in names]


@pytest.mark.slow
def test_an_export_tells_a_device_that_only_another_machine_has(
    open_engine: Callable[..., LlamaCpp], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_DEVICES", "CUDA0: NVIDIA H200 (1 MiB, 1 MiB free)")
    with pytest.raises(EngineError, match=r"\(CUDA0\), got 'cuda:1'"):
        open_engine(device="cuda:1")
    engine = open_engine(device="cuda:1", runs_here=False)
    command = list(engine.launch("autoregressive", {}).command)
    assert command[command.index("--device") + 1] == "CUDA1"
    environment = engine.environment
    assert (environment.device, environment.device_name) == ("cuda", "no CUDA1")
