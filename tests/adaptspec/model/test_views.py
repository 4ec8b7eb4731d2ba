"""Adapters, wrappers and later changes of the caller's model, against ``generate``."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import adaptspec
from adaptspec.decoder import Decoder
from adaptspec.errors import ModelLoadError, SequenceStateError
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.views import view_of
from adaptspec.model.weights import weights_digest
from adaptspec.testing.fakes import VOCAB, hf_greedy, random_ids, tiny_module
from adaptspec.token_tree import TokenTree
from adaptspec_profiles.memory import MemoryStore

PROMPT = random_ids(20)
STRATEGIES = ("autoregressive", "prompt_lookup", "token_recycling")


GREEDY: dict[str, Any] = {"strategy": "autoregressive", "temperature": 0.0}


def load(module: Any) -> Decoder:
    return adaptspec.load(module, db=MemoryStore())


def check(decoder: Decoder, module: Any) -> list[int]:
    """Every strategy gives what the module's ``generate`` gives as it is now."""
    wanted = hf_greedy(LanguageModel(copy.copy(module)), PROMPT, 12)
    for strategy in STRATEGIES:
        result = decoder.generate(
            PROMPT, strategy=strategy, max_new_tokens=12, temperature=0.0
        )
        assert result.token_ids == wanted, strategy
    return wanted


def patched(wrap: Callable[[Any], Any]) -> Any:
    module = tiny_module("qwen3")
    module.forward = wrap(module.forward)
    return module


def wrapped_well(forward: Any) -> Any:
    @functools.wraps(forward)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return patched


def hooked() -> Any:
    module = tiny_module("qwen3")
    add_hook_to_module(module, ModelHook())
    return module


def bound() -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    module = tiny_module("qwen3")
    module.forward = types.MethodType(forward, module)
    return module


def compiled_layer() -> Any:
    module = tiny_module("qwen3")
    module.model.layers[0] = torch.compile(module.model.layers[0], backend="eager")
    return module


def compiled_in_place() -> Any:
    module = tiny_module("qwen3")
    module.compile(backend="eager")
    return module


class Outer(nn.Module):
    """Somebody's own wrapper."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


WRAPPERS: dict[str, Callable[[], Any]] = {
    "functools.wraps": lambda: patched(wrapped_well),
    "lambda": lambda: patched(lambda old: lambda *a, **k: old(*a, **k)),
    "partial": lambda: patched(lambda old: functools.partial(old)),
    "method": bound,
    "accelerate hook": hooked,
    "compiled": lambda: torch.compile(tiny_module("qwen3"), backend="eager"),
    "compiled forward": lambda: patched(
        lambda old: torch.compile(old, backend="eager")
    ),
    "compiled in place": compiled_in_place,
    "compiled layer": compiled_layer,
    "data parallel": lambda: nn.DataParallel(tiny_module("qwen3")),
    "own wrapper": lambda: Outer(tiny_module("qwen3")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_hides_neither_positions_nor_which_logits_are_wanted(
    kind: str,
) -> None:
    wrapper = WRAPPERS[kind]()
    decoder = load(wrapper)
    model = decoder.model
    assert model.capability.level == "tree"
    rows: list[int] = []
    head = model.model.get_output_embeddings()  # type: ignore[operator]
    head.register_forward_hook(lambda m, args, y: rows.append(args[0].shape[1]))
    model.prefill(PROMPT, model.new_cache())
    assert rows == [1]  # of 20: the logits of a long prompt take gigabytes
    plain = tiny_module("qwen3")
    wanted = hf_greedy(LanguageModel(plain), PROMPT, 12)
    for strategy in STRATEGIES:
        found = decoder.generate(
            PROMPT, strategy=strategy, max_new_tokens=12, temperature=0.0
        )
        assert found.token_ids == wanted


def test_a_compiled_model_is_known_as_the_same() -> None:
    plain = tiny_module("qwen3")
    digest = LanguageModel(plain).digest
    assert LanguageModel(WRAPPERS["compiled"]()).digest == digest
    assert LanguageModel(compiled_layer()).digest == digest


def test_a_forward_that_swallows_arguments_still_gives_the_wanted_rows() -> None:
    module = tiny_module("llama")
    old = module.forward

    def forward(**kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        return old(**kwargs)

    module.forward = forward
    check(load(module), tiny_module("llama"))


@pytest.fixture
def adapted() -> Any:
    peft = pytest.importorskip("peft")
    settings = {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.5,
        "target_modules": ["q_proj", "up_proj"],
        "init_lora_weights": False,
    }
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft reads what transformers renamed
        model = peft.get_peft_model(
            tiny_module("llama"), peft.LoraConfig(**settings), adapter_name="a"
        )
        model.add_adapter("b", peft.LoraConfig(**settings))
    return model.eval()


@pytest.mark.slow
def test_a_change_of_adapter_takes_effect(adapted: Any) -> None:
    decoder = load(adapted)
    assert decoder.model.capability.level == "tree"
    assert decoder.model.model is not adapted
    outputs, digests = [check(decoder, adapted)], [decoder.model.digest]
    adapted.set_adapter("b")
    outputs.append(check(decoder, adapted))
    digests.append(decoder.model.digest)
    with adapted.disable_adapter():
        outputs.append(check(decoder, adapted))
        digests.append(decoder.model.digest)
    assert len(set(map(tuple, outputs))) == 3
    assert len(set(digests)) == 3
    assert decoder.environment.model == digests[2]
    adapted.set_adapter("a")
    assert check(decoder, adapted) == outputs[0]
    assert decoder.model.digest == digests[0]
    adapted.merge_adapter()
    assert check(decoder, adapted) == outputs[0]
    adapted.unmerge_adapter()
    check(decoder, adapted)
    base = adapted.merge_and_unload()
    assert check(load(base), base) == outputs[0]


def test_a_stream_doesnt_go_on_with_another_adapter(adapted: Any) -> None:
    decoder = load(adapted)
    stream = decoder.stream(PROMPT, max_new_tokens=12, **GREEDY)
    tokens = stream._steps
    next(tokens)
    adapted.set_adapter("b")
    check(decoder, adapted)
    with pytest.raises(SequenceStateError, match="was changed") as refused:
        next(tokens)
    assert "\n" not in str(refused.value)
    assert len(stream.result.token_ids) == 1


@pytest.mark.slow
def test_an_adapter_put_into_a_loaded_model_takes_effect() -> None:
    peft = pytest.importorskip("peft")
    module = tiny_module("llama")
    decoder = load(module)
    before = check(decoder, module)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["v_proj"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, module)
    assert check(decoder, module) != before
    module.model.layers[0].self_attn.v_proj.enable_adapters(False)
    module.model.layers[1].self_attn.v_proj.enable_adapters(False)
    assert check(decoder, module) == before


def test_an_adapter_in_training_mode_decodes_without_dropout(adapted: Any) -> None:
    wanted = hf_greedy(LanguageModel(adapted), PROMPT, 12)
    adapted.train()
    decoder = load(adapted)
    found = decoder.generate(PROMPT, max_new_tokens=12, **GREEDY)
    assert found.token_ids == wanted
    assert adapted.training


def test_an_adapter_of_virtual_tokens_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_module("llama"), config)
    with pytest.raises(ModelLoadError, match=r"'default' \(PROMPT_TUNING\)") as refused:
        load(model)
    assert "\n" not in str(refused.value)


def test_an_adapter_shares_its_weights_with_the_view(adapted: Any) -> None:
    view = LanguageModel(adapted).model
    addresses = {p.data_ptr() for p in adapted.parameters()}
    assert {p.data_ptr() for p in view.parameters()} <= addresses


def resize(module: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.resize_token_embeddings(VOCAB + 16)


def train(module: Any) -> None:
    with torch.no_grad():
        module.lm_head.weight.mul_(-1)


def replace_head(module: Any) -> None:
    torch.manual_seed(3)
    module.lm_head = nn.Linear(32, VOCAB, bias=False)


def load_weights(module: Any) -> None:
    module.load_state_dict(tiny_module("llama", seed=9).state_dict())


def hook_layer(module: Any) -> None:
    module.model.layers[0].mlp.register_forward_hook(lambda m, a, y: 0 * y)


CHANGES: dict[str, Callable[[Any], None]] = {
    "resize": resize,
    "train": train,
    "head": replace_head,
    "weights": load_weights,
    "hook": hook_layer,
    "type": lambda module: module.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_later_change_of_the_callers_model_takes_effect(change: str) -> None:
    module = tiny_module("llama")
    decoder = load(module)
    before = check(decoder, module)
    digest = decoder.model.digest
    CHANGES[change](module)
    after = check(decoder, module)
    if change not in ("resize", "type"):
        assert after != before
    assert (decoder.model.digest != digest) == (change != "hook")
    assert decoder.model.vocab_size == module.get_output_embeddings().weight.shape[0]


def test_a_change_that_is_undone_after_an_interruption_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = tiny_module("llama")
    decoder = load(module)
    before = check(decoder, module)

    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    handle = module.model.layers[0].mlp.register_forward_hook(lambda m, a, y: 0 * y)
    with monkeypatch.context() as patch:
        patch.setattr("adaptspec.model.language_model.fuse_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(PROMPT, max_new_tokens=4, **GREEDY)
    handle.remove()
    assert check(decoder, module) == before


def test_nothing_is_built_again_where_nothing_changed() -> None:
    module = tiny_module("llama")
    decoder = load(module)
    check(decoder, module)
    view = decoder.model.model
    module.train()  # the caller's business
    decoder.generate(PROMPT, max_new_tokens=4, **GREEDY)
    module.generate(torch.tensor([PROMPT]), max_new_tokens=3, pad_token_id=0)
    decoder.generate(PROMPT, max_new_tokens=4, **GREEDY)
    assert decoder.model.model is view
    assert not view.training


class Scaled(torch.Tensor):
    """Stands for a quantised weight: its own memory holds no elements to read."""

    held: torch.Tensor
    kind = "no tensor, as DTensor's mesh"

    @staticmethod
    def __new__(cls: type[Scaled], inner: torch.Tensor) -> Scaled:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        made.held = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held", "kind"], None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        plain = [a.held if isinstance(a, Scaled) else a for a in args]
        return func(*plain, **(kwargs or {}))


def with_special_weights() -> Any:
    module = tiny_module("llama")
    for layer in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        layer.weight = nn.Parameter(Scaled(layer.weight.data), requires_grad=False)
    return module


def test_weights_of_a_subclass_reach_no_kernel() -> None:
    module = with_special_weights()
    decoder = load(module)
    assert decoder.model.linear.replaced == 0
    check(decoder, tiny_module("llama"))
    assert weights_digest(module) != weights_digest(with_other_head())


class Hollow(Scaled):
    """The same without a word on what is inside."""

    __tensor_flatten__ = None  # type: ignore[assignment]


def test_a_weight_without_memory_has_a_digest() -> None:
    module = tiny_module("llama")
    digests = set()
    for rows in (64, 80):
        hollow = Hollow(torch.ones(rows, 32))
        module.lm_head.weight = nn.Parameter(hollow, requires_grad=False)
        digests.add(weights_digest(module))
    assert len(digests) == 2


def with_other_head() -> Any:
    module = with_special_weights()
    module.lm_head.weight = nn.Parameter(
        Scaled(-module.lm_head.weight.held), requires_grad=False
    )
    return module


class TakesOver(nn.Module):
    """As bitsandbytes' 8-bit layer: its first pass takes its weight's state away."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        values = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight.scale = scale  # type: ignore[attr-defined]
        self.scale: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            self.scale, self.weight.scale = self.weight.scale, None  # type: ignore[attr-defined]
        y: torch.Tensor = x @ (self.weight.to(x.dtype) * self.scale).T
        return y


def test_quantised_layers_work_for_the_caller_after_us() -> None:
    module = tiny_module("llama")
    for block in module.model.layers:
        block.mlp.up_proj = TakesOver(block.mlp.up_proj)
    decoder = load(module)
    decoder.generate(PROMPT, max_new_tokens=4, **GREEDY)
    check(decoder, module)  # the caller's own pass needs the state, too
    layers = [m for m in module.modules() if isinstance(m, TakesOver)]
    ours = [m for m in decoder.model.model.modules() if isinstance(m, TakesOver)]
    assert ours == layers


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bitsandbytes_model_works_for_both(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    module = tiny_module("llama", hidden_size=64, intermediate_size=128)
    for parent in list(module.model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            sizes = (child.in_features, child.out_features, False)
            data = child.weight.data
            if bits == 8:
                layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(
                    data, requires_grad=False, has_fp16_weights=False
                )
            else:
                layer = bnb.nn.Linear4bit(*sizes)
                layer.weight = bnb.nn.Params4bit(data, requires_grad=False)
            setattr(parent, name, layer)
    module = module.to("cpu").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(load(module), module)


def test_a_torchao_model_decodes_as_its_generate() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    module = tiny_module("llama", hidden_size=64, intermediate_size=128)
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())
    decoder = load(module)
    assert decoder.model.linear.replaced == 0
    check(decoder, module)


def test_a_fake_or_released_weight_isnt_read() -> None:
    linear = nn.Linear(8, 8)
    view: Any = view_of(nn.Sequential(linear))
    from adaptspec.acceleration.linear import accelerate_linears

    linear.weight.untyped_storage().resize_(0)
    assert accelerate_linears(view, own_weights=False).replaced == 0


def test_trees_are_verified_behind_a_patched_forward() -> None:
    model = LanguageModel(patched(lambda old: lambda *a, **k: old(*a, **k)))
    cache = model.new_cache()
    model.prefill(PROMPT, cache)
    forward = model.forward_tree(TokenTree((3, 4, 5, 6), (-1, 0, 0, 1)), cache)
    source: Any = tiny_module("qwen3")
    with torch.no_grad():
        wanted = source(torch.tensor([[*PROMPT, 3, 5]])).logits[0, -1]
    torch.testing.assert_close(forward.logits[2], wanted, rtol=1e-4, atol=1e-4)
