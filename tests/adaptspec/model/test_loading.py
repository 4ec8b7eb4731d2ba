"""Models that can't be loaded, and why: one line with the thing and the way out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adaptspec
from adaptspec.cli import build_cli
from adaptspec.errors import ModelLoadError
from adaptspec.host import Host
from adaptspec.model.checkpoints import device_named
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.testing.fakes import (
    hf_greedy,
    random_ids,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec_profiles.memory import MemoryStore

PROMPT = random_ids(20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_module("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def refusal(model: Any, **arguments: Any) -> str:
    with pytest.raises(ModelLoadError) as refused:
        load_model(model, **arguments)
    told = str(refused.value)
    assert "\n" not in told
    return told


def shard(folder: Path) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    module.save_pretrained(folder, max_shard_size="20KB")


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def junk(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def cut_shard(folder: Path) -> None:
    shard(folder)
    weights = sorted(folder.glob("model-*.safetensors"))[1]
    weights.write_bytes(weights.read_bytes()[:-10])


def cut_pickle(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])


def bad_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map":')


def lost_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def settings(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**known, **changed}))

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "model.safetensors is damaged"),
    "empty": (empty, "model.safetensors is damaged"),
    "junk": (junk, "model.safetensors is damaged"),
    "cut shard": (cut_shard, "model-00002-of"),
    "cut pickle": (cut_pickle, "pytorch_model.bin is damaged"),
    "bad index": (bad_index, "model.safetensors.index.json is damaged"),
    "lost shard": (lost_shard, "model-00002-of"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "give a folder"),
    "no head": (drop("lm_head.weight"), r"lacks 1 weights .*lm_head.weight"),
    "no layer": (
        drop("model.layers.1.mlp.up_proj.weight"),
        r"layers.1.mlp.up_proj.weight",
    ),
    "more layers": (settings(num_hidden_layers=3), r"lacks 9 .*model.layers.2"),
    "wider": (settings(intermediate_size=80), "give a folder"),
    "bad settings": (write("config.json", '{"model_type": "lla'), "config.json"),
    "unknown kind": (settings(model_type="no-such-kind"), "no-such-kind"),
    "bitsandbytes": (
        settings(
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "bitsandbytes",
    ),
    "gptq": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"gptq|GPTQ|optimum",
    ),
    "no tokenizer": (remove_tokenizer, "there is no tokenizer"),
    "bad tokenizer": (write("tokenizer.json", '{"version": "1.0'), "the tokenizer"),
    "empty tokenizer": (write("tokenizer.json", ""), "the tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_told_in_one_line(kind: str, folder: Path) -> None:
    if kind == "bitsandbytes" and find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is here")
    change, named = DAMAGE[kind]
    change(folder)
    told = refusal(folder)
    assert re.search(named, told), told
    assert str(folder) in told


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such-model", "~/no-such"])
def test_a_folder_that_is_not_there_is_named_as_one(path: str) -> None:
    with pytest.raises(ModelLoadError, match=f"there is no folder '{path}'"):
        load_model(path)


def test_a_file_in_place_of_a_folder_is_told(folder: Path) -> None:
    assert "is a file" in refusal(folder / "model.safetensors")


@pytest.mark.parametrize(
    "device", ["cuda:99", "xpu:3", "gpu", "mps:5", "meta", "cpu:7", "nonsense", "hpu"]
)
def test_a_device_that_isnt_there_is_told_with_those_that_are(
    device: str, folder: Path
) -> None:
    told = refusal(folder, device=device)
    assert repr(device) in told
    assert "(cpu" in told


def test_the_cpu_is_there() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["int8", "fp16", "Tensor", "", torch.int32])
def test_a_type_that_weights_cant_have_is_told(dtype: Any, folder: Path) -> None:
    assert "bfloat16" in refusal(folder, dtype=dtype)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_too_little_memory_is_told(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    assert "doesn't fit into the memory of cpu" in refusal(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_attention_that_takes_no_mask_gives_way_to_one_that_does(
    name: str, kind: str
) -> None:
    module = tiny_module(kind)
    wanted = hf_greedy(LanguageModel(module), PROMPT, 12)
    module.config._attn_implementation_internal = name
    model = LanguageModel(module)
    assert model.capability.level == "tree"
    decoder = adaptspec.load(model, db=MemoryStore())
    found = decoder.generate(
        PROMPT, strategy="prompt_lookup", max_new_tokens=12, temperature=0.0
    )
    assert found.token_ids == wanted
    assert module.config._attn_implementation == name  # the caller's stays


@pytest.mark.slow
def test_a_draft_with_fewer_embeddings_than_the_targets_ids_still_drafts() -> None:
    target = tiny_module("llama", vocab_size=80)
    draft = tiny_module("llama", seed=2, vocab_size=64)
    tokenizer = tiny_tokenizer(60)
    wanted = hf_greedy(LanguageModel(target), PROMPT, 24)
    models = [LanguageModel(m, tokenizer) for m in (target, draft)]
    decoder = adaptspec.load(models[0], models[1], db=MemoryStore())
    assert max(wanted) >= 64
    for strategy in ("draft_model", "draft_tree"):
        found = decoder.generate(
            PROMPT,
            strategy=strategy,
            max_new_tokens=24,
            temperature=0.0,
            eos_token_ids=[],
        )
        assert found.token_ids == wanted


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(CODE)
    settings(
        model_type="own-llama",
        architectures=["OwnModel"],
        auto_map={
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
        },
    )(folder)
    return folder


@pytest.mark.slow
def test_code_of_the_models_own_runs_only_if_trusted(own_code: Path) -> None:
    told = refusal(own_code)
    assert "trust_remote_code=True" in told
    assert "--trust-remote-code" in told
    model = load_model(own_code, trust_remote_code=True)
    assert type(model.source).__name__ == "OwnModel"
    decoder = adaptspec.load(own_code, trust_remote_code=True, db=MemoryStore())
    assert decoder.model.digest == model.digest


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "w5 w9", "--model"],
        ["tune", "--model"],
        ["train", "medusa", "--self-prompts", "8", "--out", "heads", "--model"],
    ],
)
def test_commands_never_ask_on_the_terminal_whether_to_trust(
    command: list[str], own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADAPTSPEC_DATA", str(tmp_path / "data"))
    cli = build_cli(Host.installed())
    done = CliRunner().invoke(cli, [*command, str(own_code)], input="y\n")
    assert done.exit_code == 1
    assert "--trust-remote-code" in done.output
    assert "[y/N]" not in done.output
    help_text = CliRunner().invoke(cli, [*command[:-1], "--help"]).output
    assert "--trust-remote-code" in help_text


@pytest.mark.slow
def test_with_a_file_in_place_of_the_cache_folder_it_goes_on_without_the_kernel(
    folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no compiler here")
    script = (
        "import sys; from adaptspec.model.loading import load_model\n"
        "print(load_model(sys.argv[1]).linear.kind)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "ADAPTSPEC_CACHE": str(place)},
    )
    assert done.returncode == 0, done.stderr
    assert "no native kernel: the compiled kernel can't be used" in done.stdout
