"""The chain drafter against drafting from scratch; sampled drafts by frequency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Target
from adaptspec.testing.strategies import chi_square, toy_distribution
from adaptspec.token_tree import Drawn, TokenTree
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.draft.chain import DraftModel, DraftModelParams
from adaptspec_plugins.draft.drawing import DraftChain

BuildModel = Callable[..., LanguageModel]
FreshLogits = Callable[[LanguageModel, list[int]], torch.Tensor]
SEEDS = range(400)
HOT = 4.0  # flattens the tiny models' distributions, so that all outcomes count


def start(
    target: LanguageModel, draft: LanguageModel, controls: Controls, **params: Any
) -> Drafter:
    sampler = Sampler(Processors(controls, 1, target.device), controls.seed)
    strategy = DraftModel(DraftModelParams(**params))
    return strategy.start(Target(target, draft, None, (), sampler, True, perf_counter))


def generate(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    controls: Controls,
    **params: Any,
) -> Any:
    strategy = DraftModel(DraftModelParams(**params))
    return Engine(target, draft).generate(strategy, prompt, controls)


def plain(target: LanguageModel, prompt: list[int], controls: Controls) -> list[int]:
    return Engine(target).generate(Autoregressive(), prompt, controls).token_ids


@pytest.mark.parametrize(
    "params",
    [{"draft_length": 1}, {"draft_length": 5}, {"draft_length": 6, "stop": 0.6}],
)
def test_a_draft_is_what_the_draft_model_decodes_from_scratch(
    target: LanguageModel,
    draft: LanguageModel,
    fresh_logits: FreshLogits,
    prompt: list[int],
    params: dict[str, Any],
) -> None:
    drafter = start(target, draft, Controls.greedy(50), **params)
    ids, lengths = list(prompt), set()
    for step in range(8):
        tree = drafter.propose(Context(ids, 50, 128, step))
        expected: list[int] = []
        for _ in range(params["draft_length"]):
            probs = fresh_logits(draft, ids + expected).softmax(-1)
            expected.append(int(probs.argmax()))
            if float(probs.max()) < params.get("stop", 0.0):
                break
        assert list(tree.tokens) == [ids[-1], *expected]
        lengths.add(len(expected))
        # Commit a part of it and something the draft didn't say.
        ids += [*expected[: step % 4], (expected[0] + 1) % 64]
    if "stop" in params:
        assert len(lengths) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_draft_cache_is_in_step_after_every_rejection_and_nothing_is_fed_twice(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    checked_drafts: Any,
    temperature: float,
) -> None:
    controls = Controls(max_new_tokens=40, temperature=temperature, seed=0)
    stats = generate(target, draft, prompt, controls, draft_length=4).stats
    accepted = {step.accepted for step in stats.steps}
    assert {0, 4} <= accepted  # rejections at once and drafts kept whole
    assert checked_drafts.compared >= stats.proposed
    assert checked_drafts.fed[0] == len(prompt) + 1
    assert max(checked_drafts.fed[1:]) == 2  # a whole draft's last token, and the bonus


@pytest.mark.parametrize(
    "controls",
    [
        Controls(max_new_tokens=30, temperature=0.9, seed=3),
        Controls(max_new_tokens=30, temperature=1.3, top_k=12, top_p=0.9, seed=4),
    ],
)
def test_coupled_drafts_emit_plain_samplings_tokens(
    target: LanguageModel, draft: LanguageModel, prompt: list[int], controls: Controls
) -> None:
    run = generate(
        target, draft, prompt, controls, draft_sampling="coupled", draft_length=4
    )
    assert run.token_ids == plain(target, prompt, controls)
    assert run.stats.accepted > 0


def test_a_draft_equal_to_the_target_is_always_accepted_however_it_samples(
    target: LanguageModel, prompt: list[int]
) -> None:
    for controls, sampling in (
        (Controls(max_new_tokens=26, repetition_penalty=1.6), "independent"),
        (Controls(max_new_tokens=26, temperature=1.0, top_k=9, seed=0), "independent"),
        (Controls(max_new_tokens=26, temperature=1.0, top_k=9, seed=0), "coupled"),
    ):
        stats = generate(
            target, target, prompt, controls, draft_length=4, draft_sampling=sampling
        ).stats
        assert stats.accepted == stats.proposed > 0


class Overconfident(DraftModel):
    """Drafts the likeliest token but claims to have sampled it."""

    name = "overconfident"

    def start(self, target: Target) -> Drafter:
        honest = super().start(target)

        class Argmax(Drafter):
            def propose(self, context: Context) -> TokenTree:
                tree = honest.propose(context)
                best = [int(tree.draft_probs[n].argmax()) for n in range(1, len(tree))]
                draft_probs = [tree.draft_probs[n] for n in range(1, len(tree))]
                return TokenTree.chain(
                    tree.tokens[0], best, Drawn.INDEPENDENT, draft_probs
                )

        return Argmax()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "exact"),
    [
        (DraftModel(DraftModelParams(draft_length=2)), True),
        (
            DraftModel(
                DraftModelParams(draft_length=2, stop=0.5, draft_temperature=0.6)
            ),
            True,
        ),
        (DraftModel(DraftModelParams(draft_length=2, draft_sampling="coupled")), True),
        (Overconfident(DraftModelParams(draft_length=2)), False),
    ],
    ids=["independent", "stopping early, colder", "coupled", "negative control"],
)
def test_sampled_output_has_the_targets_distribution(
    llama: BuildModel,
    strategy: DraftModel,
    exact: bool,
) -> None:
    target = llama(vocab_size=5, layers=1)
    engine = Engine(target, llama(vocab_size=5, layers=1, noise=0.5))
    counts = Counter(
        tuple(
            engine.generate(
                strategy,
                [1, 2],
                Controls(max_new_tokens=4, temperature=HOT, seed=seed),
            ).token_ids[1:3]
        )
        for seed in SEEDS
    )
    p_value = chi_square(counts, toy_distribution(target, [1, 2], HOT))
    assert p_value > 1e-3 if exact else p_value < 1e-6


@pytest.mark.parametrize("width", [60, 70])
def test_a_draft_vocabulary_padded_otherwise_is_cut_or_filled_with_impossible_tokens(
    target: LanguageModel,
    llama: BuildModel,
    fresh_logits: FreshLogits,
    prompt: list[int],
    width: int,
) -> None:
    prompt = [token % 60 for token in prompt]
    other = llama(vocab_size=width)
    controls = Controls(max_new_tokens=9, temperature=1.0, seed=0)
    drafter = start(target, other, controls, draft_length=1)
    tree = drafter.propose(Context(prompt, 9, 128, 0))
    tree.check(prompt[-1], 64)
    shared = min(width, 64)
    expected = torch.zeros(64)
    expected[:shared] = fresh_logits(other, prompt)[:shared].softmax(-1)
    torch.testing.assert_close(tree.draft_probs[1], expected)


def test_drafting_ends_where_the_draft_models_positions_end(
    target: LanguageModel, gpt2: BuildModel, prompt: list[int]
) -> None:
    short = gpt2(positions=len(prompt) + 6)
    controls = Controls.greedy(20)
    run = generate(target, short, prompt, controls, draft_length=4)
    assert run.token_ids == plain(target, prompt, controls)
    proposed = [step.proposed for step in run.stats.steps]
    assert proposed[0] == 4
    assert proposed[-3:] == [0, 0, 0]


@pytest.mark.parametrize(
    ("room", "nodes", "drafted"), [(1, 9, 0), (3, 9, 2), (9, 2, 2)]
)
def test_no_deeper_than_the_room_left(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    room: int,
    nodes: int,
    drafted: int,
) -> None:
    drafter = start(target, draft, Controls.greedy(9), draft_length=4)
    assert drafter.propose(Context(prompt, room, nodes, 0)).proposed == drafted


def test_a_chain_that_measures_its_doubt_ends_where_another_token_isnt_worth_it() -> (
    None
):
    sampler = Sampler(Processors(Controls(), 1, torch.device("cpu")), 0)
    chain = DraftChain(sampler, "coupled", stop=0.1)
    logits = torch.tensor([1.0, 0.0]).log().clamp_min(-50)
    halves = torch.zeros(2)

    def length(probs: torch.Tensor, least: float) -> int:
        return chain.draft([0], 6, lambda drafted: probs, least).proposed

    assert length(halves, 0.0) == 6
    assert length(halves, 0.3) == 2  # 0.5, 0.25
    assert length(halves, 0.6) == 1
    assert length(logits, 0.9) == 6
