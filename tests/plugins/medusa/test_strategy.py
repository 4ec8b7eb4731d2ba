"""Medusa: exact whatever the heads say, good where they are, trees as asked for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.errors import HeadsLoadError
from adaptspec.heads.attached import (
    MedusaTrained,
    hidden_problem,
    lm_head_of,
    open_medusa,
)
from adaptspec.heads.checkpoints import write_heads
from adaptspec.heads.medusa import Output
from adaptspec.model.language_model import LanguageModel
from adaptspec.params import Scalar
from adaptspec.testing.fakes import ARCHITECTURES, random_ids, tiny_model
from adaptspec.testing.heads import (
    Kind,
    attach_tiny_heads,
    show_other_states,
    tiny_heads,
)
from adaptspec.testing.strategies import (
    NEW_TOKENS,
    PROMPTS,
    StrategyContract,
    greedy,
    own_greedy,
    plainly,
    record,
    sampled,
    toy_pair,
)
from adaptspec.token_tree import Drawn
from adaptspec_plugins.hybrid.strategy import Hybrid
from adaptspec_plugins.medusa.strategy import Medusa, MedusaParams, MedusaTypical
from adaptspec_plugins.medusa.trees import (
    assumed,
    best_first,
    calibrated,
    chain,
    unmeasured,
)

TREES = ("calibrated", "dynamic", "chain")
Path = tuple[int, ...]


@functools.cache
def headed(architecture: str, kind: Kind, output: Output = "own") -> LanguageModel:
    """The contract's target with heads attached; fitted to what it emits itself."""
    model = tiny_model(architecture)
    if model.capability.level == "plain":
        return model
    texts: list[list[int]] = []
    if kind in ("fitted", "wrong"):
        texts = [[*p, *own_greedy(architecture, p)] for p in PROMPTS]
    return attach_tiny_heads(model, kind, output=output, texts=texts)


@functools.cache
def toy_with_heads(kind: Kind) -> tuple[LanguageModel, LanguageModel]:
    model = tiny_model("llama", seed=3, vocab_size=5, num_hidden_layers=1)
    assert model.digest == toy_pair()[0].digest
    texts = [random_ids(20, seed, vocab_size=5) for seed in range(3)]
    return attach_tiny_heads(model, kind, texts=texts), model


class TestMedusa(StrategyContract):
    strategy = Medusa
    params = ({}, {"tree": "dynamic", "draft_length": 9}, {"tree": "chain"})

    def models(self, architecture: str) -> tuple[LanguageModel, LanguageModel]:
        model = headed(architecture, "fitted")
        return model, model

    def toys(self) -> tuple[LanguageModel, LanguageModel]:
        return toy_with_heads("fitted")


class TestMedusaTypical(StrategyContract):
    strategy = MedusaTypical
    params = ({}, {"tree": "chain"})

    def models(self, architecture: str) -> tuple[LanguageModel, LanguageModel]:
        model = headed(architecture, "fitted")
        return model, model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "fitted", "wrong", "nan", "infinite"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_output_is_plain_decodings_with_any_heads_on_any_architecture(
    architecture: str, kind: Kind
) -> None:
    model = headed(architecture, kind)
    if model.capability.level == "plain":
        assert "needs Medusa heads" in str(Medusa.unavailable(model, None))
        return
    assert Medusa.unavailable(model, None) is None
    controls = sampled(seed=4)
    engine = Engine(model)
    for tree in TREES:
        strategy = Medusa(MedusaParams.parse({"tree": tree}))
        prompt = PROMPTS[2]
        found = engine.generate(strategy, prompt, greedy()).token_ids
        assert found == own_greedy(architecture, prompt)
        found = engine.generate(strategy, prompt, controls).token_ids
        assert found == plainly(architecture, prompt, controls)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["own", "joint", "base"])
@pytest.mark.parametrize("tree", TREES)
def test_fitted_heads_are_accepted_and_wrong_ones_are_not(
    tree: str, output: Output
) -> None:
    controls = greedy()

    def taken(kind: Kind) -> float:
        strategy = Medusa(MedusaParams.parse({"tree": tree}))
        model = headed("llama", kind, output)
        runs = [Engine(model).generate(strategy, p, controls) for p in PROMPTS]
        return sum(r.stats.accepted for r in runs) / sum(r.stats.proposed for r in runs)

    fitted, random = taken("fitted"), taken("random")
    assert fitted > 0.1
    assert fitted > 3 * random
    if output == "own":
        assert taken("wrong") == 0


def test_a_guess_is_the_formula_over_the_last_kept_state() -> None:
    """Heads are asked at the token whose next one is the root."""
    model = headed("llama", "fitted")
    prompt = list(PROMPTS[3])
    strategy = Medusa(MedusaParams(tree="chain", heads=3))
    run, trees = record(strategy, model, None, prompt, greedy())
    heads = tiny_heads(
        model,
        "fitted",
        texts=[[*p, *own_greedy("llama", p)] for p in PROMPTS],
    )
    text = [*prompt, *run.token_ids]
    with torch.inference_mode():
        states = model.source(
            torch.tensor([text]), output_hidden_states=True
        ).hidden_states[-1][0]
        likeliest = heads(states).argmax(-1)
    at = len(prompt)
    steps = iter(run.stats.steps)
    for tree in trees:
        expected = likeliest[:, at - 1].tolist()
        assert tree.tokens[1:] == expected[: len(tree) - 1]
        assert tree.tokens[0] == text[at]
        at += next(steps).emitted


def test_a_reduced_vocabulary_guesses_its_own_tokens_only() -> None:
    model = tiny_model("llama")
    kept = [5, 9, 11, 30, 31, 60]
    attach_tiny_heads(model, "random", token_map=kept)
    run, trees = record(Medusa(), model, None, PROMPTS[3], greedy())
    guessed = {token for tree in trees for token in tree.tokens[1:]}
    assert guessed <= set(kept)
    assert len(guessed) > 1
    assert run.token_ids == own_greedy("llama", PROMPTS[3])


@pytest.mark.parametrize("size", [1, 2])
def test_a_vocabulary_smaller_than_the_tree_is_wide_will_do(size: int) -> None:
    model = tiny_model("llama")
    attach_tiny_heads(model, "random", token_map=list(range(7, 7 + size)))
    for tree in TREES:
        strategy = Medusa(MedusaParams.parse({"tree": tree, "draft_length": 64}))
        run, trees = record(strategy, model, None, PROMPTS[3], greedy())
        assert run.token_ids == own_greedy("llama", PROMPTS[3])
        assert max(len(c) for t in trees for c in t.children) == (
            1 if tree == "chain" else size
        )


def test_constant_heads_are_as_good_as_none_and_harm_nothing() -> None:
    model = headed("gpt2", "constant")
    run = Engine(model).generate(Medusa(), PROMPTS[2], greedy())
    assert run.token_ids == own_greedy("gpt2", PROMPTS[2])


def test_only_as_many_heads_as_the_tree_is_deep_are_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = attach_tiny_heads(tiny_model("llama"), "random", heads=5)
    asked = []
    guess = MedusaTrained.guess

    def counting(
        self: Any, hidden: Any, count: int, top_k: int, *a: Any, **k: Any
    ) -> Any:
        asked.append((count, top_k))
        return guess(self, hidden, count, top_k, *a, **k)

    monkeypatch.setattr(MedusaTrained, "guess", counting)
    strategy = Medusa(MedusaParams(draft_length=2, heads=5))
    Engine(model).generate(strategy, PROMPTS[1], Controls.greedy(6))
    assert set(asked) <= {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_heads_must_be_attached_and_fit(tmp_path: Any) -> None:
    model = tiny_model("llama")
    reason = Medusa.unavailable(model, None)
    assert reason is not None
    assert "--heads DIR" in reason
    assert "adaptspec train medusa" in reason
    heads = tiny_heads(model)
    write_heads(
        tmp_path,
        heads,
        base_model="llama",
        vocab_size=model.vocab_size,
        paths=(((0,), 0.5), ((1,), 0.2)),
        ranks=None,
        record={},
    )
    with pytest.raises(HeadsLoadError, match=r"is \[64, 32\], and \[60, 32\]"):
        open_medusa(tmp_path, tiny_model("llama", vocab_size=60))
    opened = open_medusa(tmp_path, model)
    assert opened is not None
    assert (opened.name, opened.count) == (tmp_path.name, 3)
    model.attach(opened)
    strategy = Medusa(MedusaParams(draft_length=64))
    _, trees = record(strategy, model, None, PROMPTS[1], Controls.greedy(9))
    assert all(tree.parents in ((-1, 0, 0), (-1,)) for tree in trees)
    # Read-only: what a run does to the tensors stays out of the file.
    again = open_medusa(tmp_path, model)
    assert again is not None
    assert again.digest == opened.digest


def test_heads_of_another_kind_are_left_to_other_plugins(tmp_path: Any) -> None:
    (tmp_path / "adaptspec.json").write_text('{"version": 1, "kind": "eagle"}')
    assert open_medusa(tmp_path, tiny_model("llama")) is None


def test_a_model_whose_states_are_not_its_lm_heads_input_is_refused() -> None:
    model = tiny_model("llama")
    show_other_states(model)
    attach_tiny_heads(model, "random")
    assert "aren't what its LM head reads" in str(Medusa.unavailable(model, None))


def test_a_projection_before_the_lm_head_is_found_out() -> None:
    """OPT-350m's states are wider than what its LM head reads."""
    model = tiny_model("opt", word_embed_proj_dim=16)
    assert model.head_size == 16
    reason = hidden_problem(model)
    prompt = list(PROMPTS[1])
    if reason is None:
        states = model.prefill(prompt, model.new_cache(), hidden_layers=(-1,))
        assert states.hidden[-1].shape[-1] == 16
    else:
        assert "LM head" in reason


# Trees


def every_path(heads: int, ranks: int) -> list[Path]:
    return [
        path
        for depth in range(1, heads + 1)
        for path in itertools.product(range(ranks), repeat=depth)
    ]


def chances(seed: int, heads: int, ranks: int) -> list[list[float]]:
    drawn = torch.rand((heads, ranks), generator=torch.Generator().manual_seed(seed))
    return [sorted(row, reverse=True) for row in drawn.tolist()]


def spelt(parents: Sequence[int], ranks: Sequence[int]) -> list[Path]:
    paths: list[Path] = [()]
    for parent, rank in zip(parents, ranks, strict=True):
        paths.append((*paths[parent], rank))
    return paths[1:]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("nodes", [1, 3, 10, 26])
def test_best_first_finds_the_set_of_most_expected_tokens(
    seed: int, nodes: int
) -> None:
    table = chances(seed, 3, 4)

    def value(path: Path) -> float:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= table[depth][rank]
        return product

    shape = best_first(table, nodes)
    found = spelt(shape.parents, shape.ranks)
    assert len(set(found)) == len(found) == nodes
    assert all(path[:-1] in found or len(path) == 1 for path in found)
    best = sorted(map(value, every_path(3, 4)), reverse=True)[:nodes]
    assert sum(map(value, found)) == pytest.approx(sum(best))
    front = [path for path in found if not any(path)]
    assert found[: len(front)] == front


def test_unlikely_paths_are_left_out() -> None:
    shape = best_first([[0.5, 0.3], [0.5, 0.1]], 64, least=0.15)
    assert set(spelt(shape.parents, shape.ranks)) == {(0,), (1,), (0, 0), (1, 0)}
    assert best_first([[0.1]], 64, least=0.15).ranks == ()
    assert best_first([[0.0, 0.0]], 4).ranks == ()


def test_calibrated_trees_are_the_first_paths_that_fit() -> None:
    paths = (((0,), 0.5), ((0, 0), 0.3), ((1,), 0.2), ((0, 0, 0), 0.2), ((1, 4), 0.1))
    shape = calibrated(paths, 3, 3, 10)
    assert spelt(shape.parents, shape.ranks) == [(0,), (0, 0), (1,)]
    shape = calibrated(paths, 64, 3, 10)
    # Nodes stand with the path of first children in front.
    assert spelt(shape.parents, shape.ranks)[:3] == [(0,), (0, 0), (0, 0, 0)]
    assert len(shape.ranks) == 5
    shape = calibrated(paths, 64, 2, 4)
    assert spelt(shape.parents, shape.ranks) == [(0,), (0, 0), (1,)]
    assert calibrated((((3,), 0.5),), 64, 2, 2).ranks == ()


def test_trees_of_unmeasured_heads_go_as_deep_as_the_references() -> None:
    shape = assumed(unmeasured(4, 10), 63, 4, 10)
    assert (len(shape.ranks), shape.depth) == (63, 4)
    assert 4 <= shape.width <= 10


def test_a_chain_is_the_first_rank_of_each_head() -> None:
    shape = chain(3)
    assert (shape.parents, shape.depths, shape.ranks) == (
        (0, 1, 2),
        (1, 2, 3),
        (0, 0, 0),
    )


def test_evidence_tells_head_rank_and_sureness_apart() -> None:
    model = headed("llama", "fitted")
    strategy = Medusa(MedusaParams(draft_length=64))
    _, trees = record(strategy, model, None, PROMPTS[3], greedy())
    tree = max(trees, key=len)
    tree.check(tree.tokens[0], model.vocab_size)
    assert tree.drawn is Drawn.DETERMINISTIC
    assert len(tree.evidence) == len(tree)
    assert all(0 <= mark <= 1023 for mark in tree.evidence)
    for node in range(1, len(tree)):
        for other in range(1, node):
            if tree.parents[node] == tree.parents[other]:
                assert tree.evidence[node] != tree.evidence[other]


def test_an_unsure_head_is_marked_as_such() -> None:
    heads = attach_tiny_heads(tiny_model("llama"), "constant").heads["medusa"]
    assert isinstance(heads, MedusaTrained)
    model = headed("llama", "fitted")
    unsure = heads.guess(torch.zeros(32), 3, 2, lm_head_of(model), chances=True)
    assert unsure.levels == [0, 0, 0]
    assert unsure.chances[0][0] == pytest.approx(1 / model.vocab_size)


# In a hybrid


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_a_hybrid_takes_the_heads_in_where_they_are_attached(
    architecture: str,
) -> None:
    model = headed(architecture, "fitted")
    strategy = Hybrid()
    for prompt in PROMPTS:
        run = Engine(model).generate(strategy, prompt, greedy())
        assert run.token_ids == own_greedy(architecture, prompt)
        controls = sampled(seed=6)
        run = Engine(model).generate(strategy, prompt, controls)
        assert run.token_ids == plainly(architecture, prompt, controls)
    assert (-1,) == strategy.observes(model).hidden_layers
    held = strategy.sync(None)["calibration/medusa"]
    assert float(held[:, 1].sum()) > 0  # it was asked, and seen to be right or wrong
    assert Hybrid().observes(tiny_model(architecture)).hidden_layers == ()


@pytest.mark.slow
def test_a_hybrid_that_has_run_notices_heads_that_are_attached_later() -> None:
    model = tiny_model("llama")
    strategy = Hybrid()
    prompt = PROMPTS[1]
    expected = own_greedy("llama", prompt)
    assert Engine(model).generate(strategy, prompt, greedy()).token_ids == expected
    assert "calibration/medusa" not in strategy.sync(None) or not float(
        strategy.sync(None)["calibration/medusa"][:, 1].sum()
    )
    attach_tiny_heads(model, "fitted", texts=[[*prompt, *expected]])
    assert Engine(model).generate(strategy, prompt, greedy()).token_ids == expected
    assert float(strategy.sync(None)["calibration/medusa"][:, 1].sum()) > 0


# Typical acceptance


def test_typical_acceptance_is_greedy_decoding_at_temperature_0() -> None:
    model = headed("llama", "fitted")
    strategy = MedusaTypical()
    assert not strategy.lossless
    for prompt in PROMPTS:
        run = Engine(model).generate(strategy, prompt, greedy())
        assert run.token_ids == own_greedy("llama", prompt)


@pytest.mark.slow
def test_typical_acceptance_accepts_more_than_sampling_would() -> None:
    model = headed("llama", "fitted")
    setting: Mapping[str, Scalar] = {"draft_length": 32, "posterior_threshold": 0.01}

    def accepted(cls: type[Medusa], parameters: Mapping[str, Scalar]) -> int:
        strategy = cls(cls.Params.parse(parameters))
        total = 0
        for seed in range(12):
            controls = Controls(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=seed)
            run = Engine(model).generate(strategy, PROMPTS[3], controls)
            assert len(run.token_ids) == NEW_TOKENS
            total += run.stats.accepted
        return total

    assert accepted(MedusaTypical, setting) > accepted(Medusa, {"draft_length": 32})


def test_what_typical_acceptance_emits_was_typical_or_sampled() -> None:
    """Checked against the model's own logits, step by step."""
    model = headed("llama", "fitted")
    strategy = MedusaTypical(
        MedusaTypical.Params.parse(
            {"posterior_threshold": 0.05, "posterior_alpha": 0.2, "draft_length": 32}
        )
    )
    controls = Controls(max_new_tokens=NEW_TOKENS, temperature=0.9, seed=2)
    run = Engine(model).generate(strategy, PROMPTS[3], controls)
    assert run.stats.accepted > 0
    text = [*PROMPTS[3], *run.token_ids]
    with torch.inference_mode():
        rows = (model.source(torch.tensor([text])).logits[0].double() / 0.9).softmax(-1)
    at = len(PROMPTS[3]) + 1
    for step in run.stats.steps:
        for token in text[at : at + min(step.accepted, step.emitted)]:
            probs = rows[at - 1]
            entropy = -sum(float(p) * float(torch.log(p)) for p in probs if p > 0)
            bar = min(0.05, 0.2 * float(torch.exp(torch.tensor(-entropy))))
            assert float(probs[token]) > bar - 1e-6
            at += 1
        at += step.emitted - min(step.accepted, step.emitted)
