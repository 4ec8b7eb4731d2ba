"""Quantised models: as their own ``generate`` decodes, or a reason why not."""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import adaptspec
from adaptspec.decoder import Decoder, PlainDecodingWarning
from adaptspec.errors import (
    ModelLoadError,
    UnavailableStrategyError,
    UnsupportedControlError,
)
from adaptspec.model import capability
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.loading import load_model
from adaptspec.testing.fakes import random_ids, tiny_module, tiny_tokenizer
from adaptspec_profiles.memory import MemoryStore

SIZES = {"hidden_size": 64, "intermediate_size": 128}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def own_greedy(
    module: Any, prompt: list[int], count: int
) -> tuple[list[int], list[torch.Tensor]]:
    """What the caller gets from his model, of which nothing here is ours: tokens, and
    the logits that each was chosen from."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens: list[int] = found.sequences[0, len(prompt) :].tolist()
    return tokens, [rows[0].float() for rows in found.logits]


def is_tie(logits: torch.Tensor, one: int, other: int, dtype: torch.dtype) -> bool:
    """Whether rounding alone decides between two tokens; never in float32."""
    allowed = 0.03 * float(logits.abs().max()) if dtype is torch.bfloat16 else 0.0
    return abs(float(logits[one] - logits[other])) <= allowed


def check(decoder: Decoder, module: Any) -> None:
    """Every strategy that runs gives what ``generate`` does, before and after it.

    Where a model mixes the tokens of a pass nothing of it is exchanged, and no rounding
    is an excuse.
    """
    model = decoder.model
    drafts = model.capability.level != "plain"
    for length in (1, 5, 20):
        prompt = random_ids(length, seed=length)
        wanted, logits = own_greedy(module, prompt, 12)
        for strategy in ("autoregressive", "prompt_lookup", "token_recycling"):
            if strategy != "autoregressive" and not drafts:
                with pytest.raises(UnavailableStrategyError, match="verify drafts"):
                    decoder.generate(prompt, strategy=strategy)
                continue
            found = decoder.generate(
                prompt, strategy=strategy, max_new_tokens=12, temperature=0.0
            ).token_ids
            assert len(found) == len(wanted)
            for place, pair in enumerate(zip(found, wanted, strict=True)):
                if pair[0] != pair[1]:
                    assert model.unverifiable is None
                    assert is_tie(logits[place], *pair, model.dtype), (strategy, pair)
                    break
        assert own_greedy(module, prompt, 12)[0] == wanted


class Quantised(nn.Module):
    """A Linear layer of whole numbers, whose inputs are rounded as subclasses say."""

    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() * self.scale
        return functional.linear(self.rounded(x.float()), weight).to(x.dtype)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x


class PerTensor(Quantised):
    """One scale for all tokens of a pass: a draft's tokens change it.

    Of 16 bits, so that inputs aren't found to be rounded.
    """

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax().clamp_min(1e-9) / (1 << 15)
        return (x / step).round() * step


class PerToken(Quantised):
    """A scale for each token."""

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (x / step).round() * step


class FewBits(Quantised):
    """Inputs in floating point of 8 bits."""

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 448
        return (x / step).to(torch.float8_e4m3fn).float() * step


class TwoKernels(Quantised):
    """As kernels that multiply a single row in lower precision than several."""

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float() if x.shape[-2] == 1 else x


class Outliers(Quantised):
    """As LLM.int8, on texts in which no outlier occurs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.state = types.SimpleNamespace(threshold=6.0)


def with_layers(kind: type[Quantised], dtype: torch.dtype = torch.float32) -> Any:
    module = tiny_module("llama").to(dtype)
    for parent in list(module.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child))
    return module.eval()


def load(module: Any) -> Decoder:
    return adaptspec.load(module, db=MemoryStore())


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_scale_for_all_tokens_of_a_pass_means_plain_decoding(
    dtype: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # as models are of which a miniature is looked at
        monkeypatch.setattr(capability, "THOROUGH_PARAMETERS", 0)
    module = with_layers(PerTensor, TYPES[dtype])
    decoder = load(module)
    found = decoder.model.capability
    assert found.level == "plain"
    assert "another text of the same pass" in found.reason
    check(decoder, module)


def test_rows_that_change_each_others_logits_are_refused_as_a_batch() -> None:
    module = with_layers(PerTensor)
    decoder = load(module)
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    one = torch.tensor([random_ids(7)])
    wanted = module.generate(one, **asked)
    with pytest.warns(PlainDecodingWarning):
        found = module.generate(one, custom_generate=decoder, **asked)
    assert torch.equal(found, wanted)
    two = torch.tensor([random_ids(7), random_ids(7, seed=1)])
    with pytest.raises(UnsupportedControlError, match="pass one row at a time"):
        module.generate(two, custom_generate=decoder, **asked)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", [PerToken, FewBits])
def test_activations_of_few_steps_mean_plain_decoding(
    kind: type[Quantised], dtype: str
) -> None:
    module = with_layers(kind, TYPES[dtype])
    decoder = load(module)
    assert decoder.model.capability.level == "plain"
    assert f"({kind.__name__}) round activations" in decoder.model.capability.reason
    check(decoder, module)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_whole_numbers_are_no_obstacle(dtype: str) -> None:
    module = with_layers(Quantised, TYPES[dtype])
    decoder = load(module)
    assert decoder.model.unverifiable is None
    assert decoder.model.capability.level == "tree"
    check(decoder, module)


def test_experts_that_are_given_other_tokens_are_no_obstacle() -> None:
    assert LanguageModel(tiny_module("mixtral")).unverifiable is None


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_two_kernels_of_different_precision_mean_plain_decoding(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(capability, "THOROUGH_PARAMETERS", 0)
    module = with_layers(TwoKernels)
    decoder = load(module)
    assert decoder.model.capability.level == "plain"
    assert not decoder.model.capability.uncached
    check(decoder, module)


def test_outlier_columns_mean_plain_decoding_though_none_occurs() -> None:
    module = with_layers(Outliers)
    decoder = load(module)
    assert decoder.model.capability.level == "plain"
    assert "llm_int8_threshold" in decoder.model.capability.reason
    check(decoder, module)


def torchao(name: str, **arguments: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)(**arguments))


def bitsandbytes(**arguments: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**arguments)  # type: ignore[no-untyped-call]


def quanto(weights: str) -> Any:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights=weights)


METHODS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "bitsandbytes 8-bit": (lambda: bitsandbytes(load_in_8bit=True), {"plain"}),
    "bitsandbytes 8-bit, no outliers": (
        lambda: bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
        {"plain"},
    ),
    "bitsandbytes fp4": (lambda: bitsandbytes(load_in_4bit=True), {"tree", "plain"}),
    "bitsandbytes nf4": (
        lambda: bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        {"tree", "plain"},
    ),
    "torchao int8": (lambda: torchao("Int8WeightOnlyConfig"), {"tree"}),
    "torchao float8": (lambda: torchao("Float8WeightOnlyConfig"), {"tree"}),
    "torchao int4": (
        lambda: torchao("IntxWeightOnlyConfig", weight_dtype=vars(torch)["int4"]),
        {"tree"},
    ),
    "torchao int8, dynamic": (
        lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        {"plain"},
    ),
    "quanto int8": (lambda: quanto("int8"), {"tree"}),
    "quanto float8": (lambda: quanto("float8"), {"tree"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("plain")
    tiny_module("llama", **SIZES).save_pretrained(where)
    return where


def quantised(folder: Path, settings: Any, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader: Any = AutoModelForCausalLM
        return reader.from_pretrained(
            folder, quantization_config=settings, dtype=dtype
        ).eval()


@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_model_decodes_as_its_generate_and_stays_as_it_is(
    method: str, dtype: str, folder: Path
) -> None:
    make, levels = METHODS[method]
    module = quantised(folder, make(), TYPES[dtype])
    kinds = [type(m) for m in module.modules()]
    decoder = load(module)
    model = decoder.model
    assert model.capability.level in levels, model.capability.reason
    check(decoder, module)
    assert [type(m) for m in module.modules()] == kinds
    # What holds quantised weights is shared, so that no weight is there twice.
    addresses = {p.data_ptr() for p in module.parameters()}
    assert {p.data_ptr() for p in model.model.parameters()} <= addresses
    assert not model.follow()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [m for m in METHODS if "quanto" not in m])
def test_a_folder_of_quantised_weights_is_decoded_as_its_model(
    method: str, folder: Path, tmp_path: Path
) -> None:
    quantised(folder, METHODS[method][0](), torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None  # generate, too, goes on to the end
    decoder = adaptspec.load(tmp_path, tokenizer=tokenizer, db=MemoryStore())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader: Any = AutoModelForCausalLM
        module = reader.from_pretrained(tmp_path).eval()
    check(decoder, module)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_dont_run_here_are_refused_with_their_quantiser(
    folder: Path,
) -> None:
    """Its 4-bit layers can't be multiplied under torch.inference_mode."""
    module = quantised(folder, quanto("int4"), torch.float32)
    with pytest.raises(ModelLoadError, match="quantised by quanto") as refused:
        assert LanguageModel(module).capability
    assert "\n" not in str(refused.value)


# Methods that need a GPU, a package that isn't here, or weights that aren't.
UNREADABLE: dict[str, dict[str, Any]] = {
    "aqlm": {},
    "auto-round": {"bits": 4},
    "awq": {"bits": 4, "group_size": 32},
    "compressed-tensors": {"format": "int-quantized", "config_groups": {}},
    "eetq": {},
    "fbgemm_fp8": {},
    "fouroversix": {},
    "fp_quant": {},
    "gptq": {"bits": 4},
    "higgs": {},
    "hqq": {},
    "nvfp4": {},
    "quanto": {"weights": "int8"},
    "quark": {},
    "sinq": {},
    "spqr": {"bits": 3, "beta1": 16, "beta2": 16},
    "torchao": {"quant_type": {"default": {"_type": "NoSuchConfig", "_data": {}}}},
    "vptq": {"config_for_layers": {}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", UNREADABLE)
def test_a_folder_that_cant_be_read_is_refused_with_its_quantiser(
    method: str, tmp_path: Path
) -> None:
    tiny_module("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"] = {"quant_method": method, **UNREADABLE[method]}
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelLoadError, match=f"quantised by {method}: ") as refused:
        load_model(tmp_path, tokenizer=tiny_tokenizer())
    assert "\n" not in str(refused.value)


def test_every_method_of_this_transformers_is_on_the_page_of_models() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    named = {
        name.partition("_")[0] if "bits" in name else name
        for name in AUTO_QUANTIZER_MAPPING
    }
    assert {name for name in named if f"`{name}`" not in page} == set()
