"""Fixed shapes give what dynamic ones do: bits on the CPU, tokens with any strategy."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import ModelLoadError
from adaptspec.host import Host
from adaptspec.model import fixed_shapes
from adaptspec.model.fixed_cache import FixedCache
from adaptspec.model.language_model import LanguageModel
from adaptspec.model.masks import Reach, tree_mask
from adaptspec.model.step_inputs import StepInputs
from adaptspec.testing.fakes import (
    ARCHITECTURES,
    VOCAB,
    hf_greedy,
    noisy_draft,
    random_ids,
    tiny_module,
)
from adaptspec.token_tree import TokenTree
from kernels import needs_compiler

# Those whose products and attention our kernels compute: see `test_same_bits`.
SAME_BITS = [
    *("llama", "qwen2", "qwen3", "gemma3", "mistral", "gpt_neox", "phi", "opt"),
]
DTYPES = [torch.bfloat16, torch.float32]
TREES = [name for name in ARCHITECTURES if name not in ("bloom", "mamba")]
PROMPT = random_ids(20)
CPU = torch.device("cpu")


def random_tree(nodes: int, seed: int) -> TokenTree:
    """Each node below one of the five before it, no token twice below one node."""
    random_ = random.Random(seed)
    parents = [-1, *(random_.randrange(max(0, i - 5), i) for i in range(1, nodes))]
    tokens = [random_.randrange(2, VOCAB)]
    for i in range(1, nodes):
        taken = {tokens[j] for j in range(1, i) if parents[j] == parents[i]}
        tokens.append(random_.choice([t for t in range(2, VOCAB) if t not in taken]))
    return TokenTree(tokens, parents)


def fixed(module: Any, whole: bool) -> LanguageModel:
    """A model in fixed shapes; ``whole``: as on a GPU, over all slots."""
    model = LanguageModel(module, shapes="fixed")
    assert model.capability.level == "tree"
    assert model.shapes.kind == "fixed", model.shapes
    assert model.fixed is not None
    model.fixed.whole = whole
    return model


def unfused(model: LanguageModel) -> LanguageModel:
    """Layers run their modules, as over slots they do anyway."""
    for module in model.model.modules():
        module.__dict__.pop("whole", None)
    return model


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", SAME_BITS)
def test_random_trees_have_the_bits_of_dynamic_shapes(
    family: str, dtype: torch.dtype, whole: bool
) -> None:
    module = tiny_module(family).to(dtype)
    ours, own = fixed(module, whole), LanguageModel(module)
    if whole:
        unfused(ours), unfused(own)
    caches = [ours.new_cache(200), own.new_cache(200)]
    assert isinstance(caches[0], FixedCache) == whole
    for model, cache in zip((ours, own), caches, strict=True):
        model.prefill(PROMPT, cache)
    for seed, nodes in enumerate((1, 3, 4, 12, 40, 2, 17)):
        tree, length = random_tree(nodes, seed), own_length(caches)
        ahead, behind = (
            model.forward_tree(tree, cache, hidden_layers=(1, -1))
            for model, cache in zip((ours, own), caches, strict=True)
        )
        assert ahead.rows == behind.rows
        assert torch.equal(ahead.logits, behind.logits), nodes
        assert list(ahead.best) == list(behind.best)
        for layer in (1, -1):
            assert torch.equal(ahead.hidden[layer], behind.hidden[layer])
        line = tree.ancestors()[random.Random(seed).randrange(nodes)]
        for cache in caches:
            cache.keep(length, line)


def own_length(caches: Any) -> int:
    """Of both, which must be one."""
    lengths = {cache.length for cache in caches}
    assert len(lengths) == 1
    return int(lengths.pop())


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("architecture", TREES)
def test_levels_of_a_tree_are_appended_as_in_dynamic_shapes(
    architecture: str, whole: bool
) -> None:
    module = tiny_module(architecture)
    ours, own = fixed(module, whole), LanguageModel(module)
    tree = random_tree(20, 5)
    found = []
    for model in (ours, own):
        cache = model.new_cache(100)
        model.prefill(PROMPT, cache)
        part = TokenTree(tree.tokens[:6], list(tree.parents)[:6])
        model.forward_tree(part, cache)
        forward = model.extend(tree, cache, 6)
        assert cache.length == len(PROMPT) + 20
        found.append(forward.logits[[forward.rows[node] for node in range(6, 20)]])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("architecture", TREES)
def test_every_strategy_decodes_the_same_tokens(architecture: str, whole: bool) -> None:
    model = fixed(tiny_module(architecture), whole)
    draft = noisy_draft(model)
    draft = fixed(draft.source, whole)
    prompt = [*PROMPT[:8], *PROMPT[:8]]
    truth = hf_greedy(model, prompt, 24)
    done = []
    for name, strategy in sorted(Host.installed().strategies.items()):
        if strategy.unavailable(model, draft):
            continue
        run = Engine(model, draft, guard=False).generate(
            strategy(), prompt, Controls.greedy(24)
        )
        assert run.token_ids == truth, name
        done.append(name)
    assert {"autoregressive", "draft_model", "draft_tree", "hybrid"} <= set(done)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_sampled_tokens_are_those_of_dynamic_shapes(whole: bool) -> None:
    module = tiny_module("qwen2")
    controls = Controls(max_new_tokens=30, temperature=0.8, seed=3)
    strategy = Host.installed().strategy("prompt_lookup")
    found = [
        Engine(model, guard=False).generate(strategy(), PROMPT * 2, controls).token_ids
        for model in (fixed(module, whole), LanguageModel(module))
    ]
    assert found[0] == found[1]


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Any topology of up to 12 nodes."""
    count = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, count))]
    return TokenTree([5] * count, parents)


@pytest.mark.slow
@settings(deadline=None)
@given(
    trees(),
    st.integers(0, 20),
    st.integers(0, 5),
    st.one_of(
        st.just(Reach()),
        st.builds(Reach, window=st.integers(1, 9)),
        st.builds(Reach, chunk=st.integers(1, 9)),
    ),
)
def test_masks_over_slots_are_those_over_rows(
    tree: TokenTree, cached: int, over: int, reach: Reach
) -> None:
    """Rows left over see what the root does; slots behind the nodes nobody sees."""
    width, slots = max(7, len(tree)) + over, 64
    inputs = StepInputs(width, 30, {"all": reach}, torch.float32, CPU)
    inputs.fill(random_tree(7, 1), 11)  # what another step left there
    inputs.fill(tree, cached)
    mask = inputs.masks(torch.arange(slots))[0, 0]
    own = tree_mask(tree, cached, reach, torch.float32, CPU)[0, 0]
    behind = cached + len(tree)
    assert torch.equal(mask[: len(tree), :behind], own)
    assert (mask[: len(tree), behind:] < 0).all()
    for row in range(len(tree), width):
        assert torch.equal(mask[row, :cached], mask[0, :cached])
        assert (mask[row, cached:] == 0).nonzero()[:, 0].tolist() == [row]
    assert inputs.positions[0].tolist() == [
        *(cached + depth for depth in tree.depths),
        *([cached] * (width - len(tree))),
    ]
    assert inputs.slots.tolist() == list(range(cached, cached + width))


@pytest.mark.slow
def test_on_a_cpu_shapes_are_dynamic_unless_fixed_ones_are_asked_for() -> None:
    model = LanguageModel(tiny_module("llama"))
    assert model.capability.level == "tree"
    assert (model.shapes.kind, model.fixed) == ("dynamic", None)
    with pytest.raises(ModelLoadError, match="auto, fixed, dynamic, got 'static'"):
        LanguageModel(tiny_module("llama"), shapes="static")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_cache_moves_to_more_slots_when_it_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fixed(tiny_module("llama"), whole=True)
    assert model.fixed is not None
    model.fixed._sets.clear()
    monkeypatch.setattr(fixed_shapes, "LEAST_SLOTS", 160)
    monkeypatch.setattr(fixed_shapes, "USUAL_TOKENS", 30)
    cache = model.new_cache(200)
    assert isinstance(cache, FixedCache)
    first = cache.set
    assert first.capacity == 160
    truth = hf_greedy(model, PROMPT, 60)
    model.prefill(PROMPT, cache)
    text = list(PROMPT)
    for token in truth:
        forward = model.forward_tree(TokenTree.root_only(token), cache)
        text.append(token)
    assert cache.set.capacity == 320
    assert first.free
    whole = model.prefill(text, LanguageModel(model.source).new_cache())
    torch.testing.assert_close(forward.logits[0], whole.logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sequences_without_a_set_are_decoded_in_dynamic_shapes() -> None:
    model = fixed(tiny_module("llama"), whole=True)
    caches = [model.new_cache(50) for _ in range(5)]
    assert [isinstance(cache, FixedCache) for cache in caches] == [True] * 4 + [False]
    sets = {id(cache.set) for cache in caches if isinstance(cache, FixedCache)}
    assert len(sets) == 4
    strategy = Host.installed().strategy("prompt_lookup")
    run = Engine(model).generate(strategy(), PROMPT, Controls.greedy(12))
    assert run.token_ids == hf_greedy(model, PROMPT, 12)
    caches.clear()
    gc.collect()
    again = model.new_cache(50)
    assert isinstance(again, FixedCache)
    assert id(again.set) in sets


@pytest.mark.slow
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_row_that_isnt_a_number_is_gone_once_it_is_rejected(number: float) -> None:
    """Masked slots are multiplied by zero, which leaves NaN what is NaN."""
    module = tiny_module("llama")
    with torch.no_grad():
        module.model.embed_tokens.weight[9] = number
    model = fixed(module, whole=True)
    prompt = [t for t in PROMPT if t != 9]
    cache = model.new_cache(60)
    model.prefill(prompt, cache)
    forward = model.forward_tree(TokenTree.chain(5, [9, 6]), cache)
    assert not forward.finite
    cache.keep(len(prompt), [0])
    after = model.forward_tree(TokenTree.root_only(7), cache)
    own = LanguageModel(module)
    whole = own.prefill([*prompt, 5, 7], own.new_cache())
    torch.testing.assert_close(after.logits[0], whole.logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "overrides", "reason"),
    [
        ("mamba", {}, "can't be rolled back"),
        ("bloom", {}, "masks of their own"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                }
            },
            "changes with the length",
        ),
        ("llama", {"max_position_embeddings": 30}, "30 positions"),
    ],
)
def test_models_that_cant_have_fixed_shapes_say_why(
    architecture: str, overrides: dict[str, Any], reason: str
) -> None:
    model = LanguageModel(tiny_module(architecture, **overrides), shapes="fixed")
    assert model.capability is not None
    assert model.shapes.kind == "dynamic"
    assert reason in model.shapes.reason
    assert model.fixed is None
    run = Engine(model).generate(
        Host.installed().strategy("autoregressive")(), PROMPT[:6], Controls.greedy(8)
    )
    assert run.token_ids == hf_greedy(model, PROMPT[:6], 8)


def test_forwards_that_dont_agree_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows left over are shown to the others: a fault of masks."""
    own = StepInputs.masks

    def faulty(self: StepInputs, *arguments: Any) -> Any:
        return torch.zeros_like(own(self, *arguments))

    monkeypatch.setattr(StepInputs, "masks", faulty)
    model = LanguageModel(tiny_module("llama"), shapes="fixed")
    assert model.capability.level == "tree"
    assert model.shapes.kind == "dynamic"
    assert "logits differ" in model.shapes.reason


@pytest.mark.slow
def test_what_a_caller_changes_in_his_model_is_settled_again() -> None:
    module = tiny_module("llama")
    model = fixed(module, whole=True)
    before = model.fixed
    with torch.no_grad():
        module.lm_head.weight.mul_(-1)
    assert model.follow()
    assert model.fixed is None
    assert model.capability.level == "tree"
    assert model.shapes.kind == "fixed"
    assert model.fixed is not before
