"""Offloaded, split, foreign and adapted models: as their ``generate``, or refused."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

import adaptspec
from adaptspec.decoder import Decoder
from adaptspec.errors import ModelLoadError
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.testing.fakes import random_ids, tiny_module
from adaptspec_profiles.memory import MemoryStore

PROMPT = random_ids(20)
STRATEGIES = ("autoregressive", "prompt_lookup", "token_recycling")


def load(module: Any) -> Decoder:
    return adaptspec.load(module, db=MemoryStore())


def own_greedy(module: Any) -> list[int]:
    """What the caller gets from his model, of which nothing here is ours."""
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        found = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def check(decoder: Decoder, module: Any) -> list[int]:
    wanted = own_greedy(module)
    drafts = decoder.model.capability.level != "plain"
    for strategy in STRATEGIES if drafts else STRATEGIES[:1]:
        found = decoder.generate(
            PROMPT, strategy=strategy, max_new_tokens=12, temperature=0.0
        )
        assert found.token_ids == wanted, strategy
    assert own_greedy(module) == wanted
    return wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model")
    tiny_module("llama").save_pretrained(where)
    return where


def on_cpu(folder: Path, scratch: Path) -> Any:
    module = AutoModelForCausalLM.from_pretrained(folder)
    return cpu_offload(module, torch.device("cpu"))


def on_disk(folder: Path, scratch: Path) -> Any:
    module = AutoModelForCausalLM.from_pretrained(folder)
    disk_offload(module, str(scratch), torch.device("cpu"))
    return module


def on_both(folder: Path, scratch: Path) -> Any:
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=str(scratch)
    )


OFFLOADED: dict[str, Callable[[Path, Path], Any]] = {
    "cpu": on_cpu,
    "disk": on_disk,
    "cpu and disk": on_both,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OFFLOADED)
def test_an_offloaded_model_decodes_as_its_generate(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    module = OFFLOADED[kind](folder, tmp_path)
    decoder = load(module)
    assert decoder.model.model is module
    assert decoder.model.device == torch.device("cpu")
    assert decoder.model.capability.level == "tree"
    assert check(decoder, module) == own_greedy(tiny_module("llama"))
    assert any(parameter.is_meta for parameter in module.parameters())
    assert not decoder.model.follow()  # its hooks put other empty tensors there


def test_an_offloaded_model_is_known_by_its_weights(
    folder: Path, tmp_path: Path
) -> None:
    whole = LanguageModel(tiny_module("llama")).digest
    for kind, make in OFFLOADED.items():
        scratch = tmp_path / kind
        assert LanguageModel(make(folder, scratch)).digest == whole
    other = cpu_offload(tiny_module("llama", seed=9), torch.device("cpu"))
    assert LanguageModel(other).digest != whole


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(tiny_module("llama").config)  # type: ignore[no-untyped-call]
    with pytest.raises(ModelLoadError, match="no hook brings into memory") as refused:
        load(module)
    assert "\n" not in str(refused.value)


@pytest.mark.slow  # torch's compiler is imported
def test_layers_compiled_one_by_one_decode_as_they_are() -> None:
    module = tiny_module("qwen3")
    for layer in module.model.layers:
        layer.compile(backend="eager")
    decoder = load(module)
    assert decoder.model.capability.level == "tree"
    check(decoder, module)
    assert all(layer._compiled_call_impl for layer in module.model.layers)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    from torch import distributed

    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "FSDPModule"])
def test_weights_split_over_processes_are_refused_by_name(
    kind: str, process_group: None
) -> None:
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    module = tiny_module("llama")
    if kind == "FSDPModule":
        mesh = init_device_mesh("cpu", (1,))
        fsdp.fully_shard(module, mesh=mesh)
    else:
        module = fsdp.FullyShardedDataParallel(module, device_id=torch.device("cpu"))
    with pytest.raises(ModelLoadError, match=f"split over processes .{kind}") as told:
        load(module)
    assert "\n" not in str(told.value)


class Held(nn.Parameter):
    """Stands for DTensor's: a part of a weight of which two processes have one each."""

    device_mesh = types.SimpleNamespace(size=lambda: 2)


def test_a_tensor_parallel_model_is_refused_by_name() -> None:
    module = tiny_module("llama")
    module.lm_head.weight = Held(module.lm_head.weight.detach())
    with pytest.raises(ModelLoadError, match=r"split over processes \(Held\).*tp_plan"):
        load(module)


def exported() -> Any:
    return torch.export.export(nn.Linear(4, 4), (torch.ones(1, 4),))


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "pipeline": (
        lambda: types.SimpleNamespace(model=tiny_module("llama")),
        r"SimpleNamespace; pass its \.model",
    ),
    "exported": (exported, r"ExportedProgram; pass the module it was made from"),
    "engine": (lambda: types.SimpleNamespace(llm_engine=1), "vLLM"),
    "number": (lambda: 7, "builtins.int"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_librarys_object_is_refused_by_its_type(kind: str) -> None:
    make, named = FOREIGN[kind]
    with pytest.raises(ModelLoadError, match=named) as refused:
        load_model(make())
    assert "\n" not in str(refused.value)


def test_a_gguf_file_is_refused_with_the_way_to_read_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="gguf_file="):
        load_model(path)


# PEFT's kinds of adapters with what a tiny model needs; the others take the default.
LAYERS = {"target_modules": ["q_proj", "up_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BOFT": {**LAYERS, "boft_block_size": 4},
    "FOURIERFT": {**LAYERS, "n_frequency": 50},
    "IA3": {
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "HRA": LAYERS,
    "LN_TUNING": {},
    "LOHA": LAYERS,
    "LOKR": LAYERS,
    "LORA": {**LAYERS, "use_dora": True},
    "OFT": LAYERS,
    "RANDLORA": LAYERS,
    "VERA": LAYERS,
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "LILY": LAYERS,
    "POLY": LAYERS,
}
REFUSED = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "POLY")


def adapted(kind: str) -> Any:
    peft = pytest.importorskip("peft")
    known = {
        str(name).rpartition(".")[2]: made
        for name, made in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if kind not in known:
        pytest.skip(f"this peft has no {kind}")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            tiny_module("llama"), known[kind](task_type="CAUSAL_LM", **SETTINGS[kind])
        )
    scale = 2.0 if kind == "ADAPTION_PROMPT" else 0.3
    with torch.no_grad():  # most start as if they weren't there
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SETTINGS)
def test_every_kind_of_adapter_decodes_as_its_generate_or_is_refused_by_name(
    kind: str,
) -> None:
    model = adapted(kind)
    if kind in REFUSED:
        with pytest.raises(ModelLoadError, match=rf"'default' \({kind}\)") as refused:
            load(model).generate(PROMPT, strategy="autoregressive")
        assert "\n" not in str(refused.value)
        return
    decoder = load(model)
    found = decoder.model.capability
    # Lily weighs its parts by all tokens of a pass.
    assert found.level == ("plain" if kind == "LILY" else "tree")
    assert ("same pass" in found.reason) == (kind == "LILY")
    digest = decoder.model.digest
    assert check(decoder, model) != own_greedy(tiny_module("llama"))
    with model.disable_adapter():
        check(decoder, model)
    assert decoder.model.digest != digest
