"""Early exit: the lower layers draft on the target's cache, and leave no trace."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import nn

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.model.cache import TreeCache
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Target
from adaptspec.testing import StrategyContract
from adaptspec.testing.fakes import (
    ARCHITECTURES,
    WINDOW,
    hf_greedy,
    random_ids,
    tiny_model,
    tiny_module,
)
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.early_exit import EarlyExit, EarlyExitParams, Pace, exit_layer

# A recurrent state can't be rolled back.
REFUSED = ("mamba",)
ALLOWED = [name for name in ARCHITECTURES if name not in REFUSED]
LAYERS = 4
PROMPT = random_ids(2 * WINDOW + 3, seed=2)
NEVER_PAUSE = {"pause": False}


class TestEarlyExit(StrategyContract):
    strategy = EarlyExit
    params = ({}, {"tokens": 5, "stop": 0.3, **NEVER_PAUSE})
    architectures = ALLOWED
    draws = 200

    def toys(self) -> tuple[LanguageModel, LanguageModel]:
        toy = tiny_model("llama", seed=3, vocab_size=5)
        return toy, toy


def sized(architecture: str, layers: int) -> dict[str, Any]:
    """Arguments for ``layers`` layers, under the architecture's own name."""
    arguments = ARCHITECTURES[architecture].arguments
    name = "n_layer" if "n_layer" in arguments else "num_hidden_layers"
    kinds = arguments.get("layer_types")
    return {name: layers, **({"layer_types": kinds[:layers]} if kinds else {})}


def deep_model(architecture: str = "llama") -> LanguageModel:
    return tiny_model(architecture, **sized(architecture, LAYERS))


def cut_by_hand(model: LanguageModel, architecture: str, layers: int) -> Any:
    """A model built with ``layers`` layers, into which the weights are copied."""
    module = tiny_module(architecture, seed=9, **sized(architecture, layers))
    weights = model.source.state_dict()
    module.load_state_dict({name: weights[name] for name in module.state_dict()})
    return module


@torch.inference_mode()
def fresh_logits(module: Any, ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = module(torch.tensor([list(ids)]), use_cache=False).logits
    return logits[0, -1]


def start(
    model: LanguageModel,
    ids: Sequence[int],
    params: dict[str, Any],
    controls: Controls | None = None,
) -> tuple[Drafter, TreeCache]:
    """A drafter before its first step: all of ``ids`` but the root is cached."""
    controls = controls or Controls.greedy(50)
    sampler = Sampler(Processors(controls, 1, model.device), controls.seed)
    cache = model.new_cache(len(ids) + 60)
    model.prefill(ids[:-1], cache)
    strategy = EarlyExit(EarlyExitParams(**{**NEVER_PAUSE, **params}))
    target = Target(model, None, cache, tuple(ids), sampler, True, perf_counter)
    return strategy.start(target), cache


def damp(module: Any, first: int, scale: float) -> Any:
    """Let the layers from ``first`` on add little, as after training to exit early."""
    with torch.no_grad():
        for layer in module.model.layers[first:]:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return module


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("architecture", ALLOWED)
def test_drafts_are_what_a_model_built_with_fewer_layers_decodes_from_scratch(
    architecture: str, layers: int
) -> None:
    model = deep_model(architecture)
    assert EarlyExit.unavailable(model, None) is None
    oracle = cut_by_hand(model, architecture, layers)
    whole = model.source
    ids = list(PROMPT)
    drafter, cache = start(model, ids, {"depth": layers / LAYERS, "tokens": 4})
    shallow, lower = model.shallow(layers), model.new_cache().lower(layers)
    shallow.prefill(ids[:-1], lower)
    for step in range(2):
        tree = drafter.propose(Context(ids, 50, 128, step))
        expected: list[int] = []
        for _ in range(4):
            logits = fresh_logits(oracle, ids + expected)
            found = shallow.prefill([(ids + expected)[-1]], lower).logits[0]
            torch.testing.assert_close(found, logits, atol=1e-3, rtol=1e-3)
            expected.append(int(logits.argmax()))
        assert list(tree.tokens) == [ids[-1], *expected]
        assert not torch.allclose(logits, fresh_logits(whole, ids + expected[:-1]))
        # Commit one drafted token, and one that wasn't.
        committed = [expected[0], (expected[1] + 1) % 64]
        model.prefill([ids[-1], committed[0]], cache)
        lower.truncate(len(ids) + 1)
        ids += committed


@pytest.mark.parametrize("architecture", REFUSED)
def test_other_architectures_are_refused(architecture: str) -> None:
    reason = EarlyExit.unavailable(tiny_model(architecture), None)
    assert reason is not None
    assert "can't verify drafts" in reason


def test_a_chain_ends_after_the_first_token_the_lower_layers_doubt() -> None:
    model = deep_model()
    oracle = cut_by_hand(model, "llama", 2)
    lengths = set()
    for seed in range(12):
        ids = random_ids(9, seed)
        drafter, _ = start(model, ids, {"depth": 0.5, "tokens": 6, "stop": 0.3})
        expected: list[int] = []
        for _ in range(6):
            probs = fresh_logits(oracle, ids + expected).softmax(-1)
            expected.append(int(probs.argmax()))
            if float(probs.max()) < 0.3:
                break
        tree = drafter.propose(Context(ids, 50, 128, 0))
        assert list(tree.tokens[1:]) == expected
        assert len(set(tree.evidence[1:])) == tree.proposed
        lengths.add(len(expected))
    assert len(lengths) > 2


def test_sampled_drafts_carry_the_lower_layers_distribution() -> None:
    model = deep_model()
    oracle = cut_by_hand(model, "llama", 2)
    ids = list(PROMPT)
    controls = Controls(max_new_tokens=50, temperature=0.7, seed=4)
    drafter, _ = start(model, ids, {"depth": 0.5, "tokens": 3}, controls)
    tree = drafter.propose(Context(ids, 50, 128, 0))
    assert sorted(tree.draft_probs) == [1, 2, 3]
    for node, probs in tree.draft_probs.items():
        expected = (fresh_logits(oracle, ids) / 0.7).softmax(-1)
        torch.testing.assert_close(probs, expected, atol=1e-5, rtol=1e-3)
        ids.append(tree.tokens[node])


def test_coupled_drafts_emit_plain_samplings_tokens() -> None:
    model = LanguageModel(damp(tiny_module("llama"), 1, 0.1))
    controls = Controls(max_new_tokens=30, temperature=0.9, top_k=12, seed=3)
    strategy = EarlyExit(EarlyExitParams(draft_sampling="coupled", pause=False))
    run = Engine(model).generate(strategy, PROMPT, controls)
    plain = Engine(model).generate(Autoregressive(), PROMPT, controls)
    assert run.token_ids == plain.token_ids
    assert run.stats.accepted > 10


def test_proposing_changes_no_row_and_no_length_of_the_targets_cache() -> None:
    model = deep_model()
    drafter, cache = start(model, PROMPT, {"depth": 0.5, "tokens": 5})
    rows = len(PROMPT) - 1
    before = [kept_bits(layer, rows) for layer in cache.rows]
    drafter.propose(Context(list(PROMPT), 50, 128, 0))
    assert [layer.length for layer in cache.rows] == [rows] * LAYERS
    for layer, bits in zip(cache.rows, before, strict=True):
        assert torch.equal(kept_bits(layer, rows), bits)


def test_a_proposal_given_up_halfway_leaves_the_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = deep_model()
    drafter, cache = start(model, PROMPT, {"depth": 0.75, "tokens": 5})
    left = iter(range(2))
    likeliest = Sampler.likeliest

    def interrupted(self: Sampler, ids: Any, logits: Any) -> int:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return likeliest(self, ids, logits)

    monkeypatch.setattr(Sampler, "likeliest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drafter.propose(Context(list(PROMPT), 50, 128, 0))
    assert [layer.length for layer in cache.rows] == [len(PROMPT) - 1] * LAYERS


def kept_bits(layer: Any, rows: int) -> torch.Tensor:
    return torch.stack([layer.keys[:, :, :rows], layer.values[:, :, :rows]]).clone()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
def test_the_models_modules_and_configurations_stay_as_they_are(
    architecture: str,
) -> None:
    model = deep_model(architecture)
    trees = [model.source, model.model]

    def state() -> list[Any]:
        return [
            (name, id(module), sorted(module._modules), str(vars(module).get("config")))
            for tree in trees
            for name, module in tree.named_modules()
        ]

    before = state()
    assert EarlyExit.unavailable(model, None) is None
    strategy = EarlyExit(EarlyExitParams(depth=0.5))
    Engine(model).generate(strategy, PROMPT, Controls.greedy(8))
    assert state() == before
    own = {id(parameter) for parameter in model.model.parameters()}
    shallow = list(model.shallow(2).model.parameters())
    assert {id(parameter) for parameter in shallow} < own


def test_sequences_in_threads_come_out_as_one_after_the_other() -> None:
    model = deep_model()
    strategy = EarlyExit(EarlyExitParams(depth=0.5, tokens=3, pause=False))
    engine = Engine(model)
    prompts = [random_ids(8 + n, seed=n) for n in range(4)]

    def decode(prompt: list[int]) -> list[int]:
        return engine.generate(strategy, prompt, Controls.greedy(20)).token_ids

    expected = [hf_greedy(model, prompt, 20) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, prompts)) == expected


@pytest.mark.parametrize(
    ("room", "nodes", "drafted"), [(1, 9, 0), (3, 9, 2), (9, 2, 2), (9, 0, 0)]
)
def test_no_deeper_than_the_room_left(room: int, nodes: int, drafted: int) -> None:
    drafter, _ = start(deep_model(), PROMPT, {"tokens": 4})
    assert drafter.propose(Context(PROMPT, room, nodes, 0)).proposed == drafted


def test_a_model_whose_upper_layers_add_little_needs_few_forwards() -> None:
    module = damp(tiny_module("llama", num_hidden_layers=LAYERS), 1, 0.02)
    model = LanguageModel(module)
    strategy = EarlyExit(EarlyExitParams(depth=0.25, tokens=4))
    run = Engine(model).generate(strategy, PROMPT, Controls.greedy(60))
    assert run.token_ids == hf_greedy(model, PROMPT, 60)
    assert len(run.stats.steps) < 30


def test_a_model_that_cannot_exit_early_soon_drafts_nothing() -> None:
    model = deep_model()
    strategy = EarlyExit(EarlyExitParams(depth=0.25, tokens=8))
    run = Engine(model).generate(strategy, PROMPT, Controls.greedy(60))
    proposed = [step.proposed for step in run.stats.steps]
    assert proposed[:4] == [1, 1, 1, 1]
    assert set(proposed[4:36]) == {0}
    assert sum(proposed) <= 8


def steps(pace: Pace, count: int, accepted: int) -> list[int]:
    """What is drafted in each of ``count`` steps of which ``accepted`` are right."""
    drafted = []
    for _ in range(count):
        drafted.append(pace.most(5))
        pace.record(drafted[-1], min(accepted, drafted[-1]))
    return drafted


def test_pauses_double_while_nothing_is_right_and_end_when_drafts_are() -> None:
    pace = Pace(price=0.3)
    trial = [1] * 4
    expected = [*trial, *[0] * 32, *trial, *[0] * 64, *trial, *[0] * 128]
    assert steps(pace, len(expected), accepted=0) == expected
    assert steps(pace, 60, accepted=5) == [*trial, *[5] * 56]


def test_a_draft_that_turns_wrong_is_paused_before_it_costs_many_forwards() -> None:
    pace = Pace(price=0.3)
    steps(pace, 50, accepted=3)
    lost = steps(pace, 60, accepted=0)
    assert 0 in lost
    assert sum(lost[: lost.index(0)]) * 0.3 < 30
    # The first of five right: 1 < 5 * 0.3, a small loss in every step.
    pace = Pace(price=0.3)
    assert 0 in steps(pace, 30, accepted=1)


@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [(0.25, 24, 6), (0.01, 24, 1), (0.99, 24, 23), (0.5, 2, 1), (0.75, 2, 1)],
)
def test_the_depth_is_a_share_of_the_layers_but_never_none_or_all(
    depth: float, layers: int, expected: int
) -> None:
    assert exit_layer(depth, layers) == expected


def test_a_model_of_one_layer_is_refused() -> None:
    reason = EarlyExit.unavailable(tiny_model("llama", num_hidden_layers=1), None)
    assert reason is not None
    assert "at least two decoder layers" in reason


def test_a_model_with_two_lists_that_could_be_its_layers_is_refused() -> None:
    module = tiny_module("llama")
    module.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    reason = EarlyExit.unavailable(LanguageModel(module), None)
    assert reason is not None
    assert "model.layers" in reason
    assert "others" in reason


def test_a_forward_that_runs_all_layers_whatever_the_view_has_is_refused() -> None:
    module = tiny_module("llama")
    # What a wrapped forward does: it stays bound to the module it was taken from.
    module.model.forward = module.model.forward
    reason = EarlyExit.unavailable(LanguageModel(module), None)
    assert reason is not None
    assert "don't run alone" in reason
