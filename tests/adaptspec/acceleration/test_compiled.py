"""Compiled norms and MLPs: what they decode, what is refused, what a profile sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptspec.acceleration import compiled
from adaptspec.decoder import Decoder
from adaptspec.environment import environment_of
from adaptspec.errors import ModelLoadError
from adaptspec.model.language_model import LanguageModel
from adaptspec.testing.fakes import random_ids, tiny_module
from adaptspec.token_tree import TokenTree
from kernels import needs_compiler

# Importing the compiler of torch warns of its own use of TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
PROMPT = random_ids(20)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_forwards_choose_what_the_module_chooses(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiled.CACHE_DIR_VARIABLE, str(tmp_path))
    module = tiny_module(family).float().eval()
    model = LanguageModel(module, compile=True)
    assert model.compiled > 0
    assert "compiled" in str(environment_of(model, None).kernel)
    assert not any("forward" in part.__dict__ for part in module.modules())
    ids = list(PROMPT)
    cache = model.new_cache()
    model.prefill(ids, cache)
    for rows in (1, 5, 8):
        tokens = random_ids(rows)
        tree = TokenTree.chain(tokens[0], list(tokens[1:]))
        found = model.forward_tree(tree, cache).logits
        cache.truncate(len(ids))
        with torch.inference_mode():
            own = module(torch.tensor([ids + list(tokens)])).logits[0, len(ids) :]
        assert torch.equal(found.argmax(-1), own.argmax(-1))
        torch.testing.assert_close(found.float(), own, atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_what_is_decoded_is_what_generate_gives(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiled.CACHE_DIR_VARIABLE, str(tmp_path))
    module = tiny_module(family).float().eval()
    decoder = Decoder(LanguageModel(module, compile=True))
    own = module.generate(
        torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    for strategy in ("autoregressive", "suffix", "hybrid"):
        found = decoder.generate(
            PROMPT, strategy=strategy, max_new_tokens=24, temperature=0
        )
        assert found.token_ids == own[0, len(PROMPT) :].tolist()
    assert any(tmp_path.rglob("*.so"))  # kept on disk


def test_modules_that_may_not_be_replaced_are_not_compiled() -> None:
    module = tiny_module("llama").eval()
    with pytest.raises(ModelLoadError, match="accelerate=False forbids"):
        LanguageModel(module, accelerate=False, compile=True)


@needs_compiler
def test_a_model_with_a_state_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match="no norm or MLP was found"):
        LanguageModel(tiny_module("mamba").eval(), compile=True)


def test_a_missing_compiler_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none_there() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_there)
    with pytest.raises(ModelLoadError, match="needs a C\\+\\+ compiler"):
        LanguageModel(tiny_module("llama").eval(), compile=True)


def test_a_part_that_gives_something_else_is_not_kept() -> None:
    part = torch.nn.LayerNorm(8)
    x = torch.randn(1, 5, 8)
    assert compiled._gives_the_same(part, part.forward, x)
    assert not compiled._gives_the_same(part, lambda y: part(y) * 1.01, x)
