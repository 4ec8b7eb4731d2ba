"""Drafts of another tokenizer: faithful readings, aligned proposals, exact output."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers import models as algorithms
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from adaptspec.decoding.controls import Controls
from adaptspec.decoding.engine import Engine
from adaptspec.decoding.processing import Processors
from adaptspec.decoding.sampling import Sampler
from adaptspec.errors import UnavailableStrategyError
from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import Context, Drafter, Target
from adaptspec.testing import StrategyContract
from adaptspec.testing.fakes import (
    noisy_draft,
    random_ids,
    tiny_model,
    tiny_module,
    tiny_tokenizer,
)
from adaptspec.testing.strategies import chi_square, toy_distribution
from adaptspec.token_tree import Drawn, TokenTree
from adaptspec_plugins.autoregressive import Autoregressive
from adaptspec_plugins.draft.chain import DraftModel, DraftModelParams
from adaptspec_plugins.universal_draft.strategy import (
    UniversalDraft,
    UniversalDraftParams,
    _Sequence,
)
from adaptspec_plugins.universal_draft.vocabularies import (
    LONGEST_TAIL,
    LOOKBEHIND,
    Vocabulary,
)

FreshLogits = Callable[[LanguageModel, list[int]], torch.Tensor]
MODES = ("text", "intersection")
HOT = 4.0  # flattens the tiny models' distributions, so that all outcomes count

NAMES: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
OCTETS = {name: byte for byte, name in NAMES.items()}

HARBOUR = [
    "The ferry left the harbour before the morning fog had lifted.",
    "She counted three herons, two cormorants and a heap of wet rope.",
    "Where the river meets the sea, the harbour master keeps a ledger.",
    "  def depth(tide):\n    return tide.low + 3\n",
]
KITCHEN = [
    "Knead the dough for ten minutes, then let it rest under a cloth.",
    "There is nothing like fresh bread: the crust sings as it cools.",
    "Wait until the water boils; the kettle will tell you when.",
    "for loaf in oven:\n    loaf.turn()\n  # naïve, but 日本 does it\n",
]
SENTENCES = {"harbour": HARBOUR, "kitchen": KITCHEN, "both": HARBOUR + KITCHEN}
HOSTILE = (
    "The ferry left 🚢🧑‍🚀 at 07:30 — 日本語のテキスト, then naïve café 😀😀😀.\n\n"
    "\tdef f(x):\n        return x<eos>  <end> ﷺ ṩ e\u0301 Ω≈ç√ \u200b\u202e."
)


@functools.cache
def byte_level(name: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some :data:`SENTENCES`."""
    inner = Tokenizer(algorithms.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end = "<eos>" if name == "harbour" else "<end>"
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end, "<sep>"],
        initial_alphabet=(pre_tokenizers.ByteLevel.alphabet() if size > 256 else []),
        show_progress=False,
    )
    inner.train_from_iterator(SENTENCES[name], trainer)
    return wrapped(inner, eos_token=end)


@functools.cache
def marked(size: int, *, composed: bool = False) -> PreTrainedTokenizerFast:
    """A BPE as SentencePiece makes them: spaces as U+2581, other bytes as ``<0x..>``.

    It puts a space before every text; ``composed`` makes it change text, too (NFC).
    """
    steps: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if composed:
        steps.insert(0, normalizers.NFC())
    trained = Tokenizer(algorithms.BPE())
    trained.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    trained.train_from_iterator(
        [word for line in KITCHEN[:3] for word in line.split()], trainer
    )
    found = json.loads(trained.to_str())["model"]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<unk>", "<s>", "</s>", *octets, *found["vocab"]]
    vocab = {token: i for i, token in enumerate(names)}
    merges = [tuple(pair) for pair in found["merges"]]
    inner = Tokenizer(
        algorithms.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence(steps)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def characters(alphabet: str) -> PreTrainedTokenizerFast:
    """One token for each character, in order."""
    vocab = {character: i for i, character in enumerate(alphabet)}
    return wrapped(Tokenizer(algorithms.BPE(vocab, [])))


def wrapped(inner: Tokenizer, **specials: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=inner, **specials)  # type: ignore[no-untyped-call]


def related(
    model: LanguageModel, tokenizer: Any, noise: float = 0.02, **overrides: Any
) -> LanguageModel:
    """A draft with ``model``'s weights, rows by token string, and a little noise."""
    theirs = model.tokenizer.get_vocab()
    size = max(tokenizer.get_vocab().values()) + 1
    name = model.name.removesuffix("-draft")
    module = tiny_module(name, vocab_size=size, **overrides)
    weights = dict(model.source.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.shape == weights[name].shape:
                parameter.copy_(weights[name])
        for part in ("get_input_embeddings", "get_output_embeddings"):
            mine = getattr(module, part)().weight
            source = getattr(model.source, part)().weight
            for token, index in tokenizer.get_vocab().items():
                if token in theirs:
                    mine[index] = source[theirs[token]]
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(drawn * noise)
    return LanguageModel(module, tokenizer, f"{name}-other")


@functools.cache
def contract_pair(architecture: str) -> tuple[LanguageModel, LanguageModel]:
    model = tiny_model(architecture, tokenizer=byte_level("harbour", 60))
    return model, related(model, byte_level("both", 120))


@functools.cache
def contract_toys() -> tuple[LanguageModel, LanguageModel]:
    """Of the target's tokens the draft lacks one, and has two of its own."""
    overrides = {"num_hidden_layers": 1}
    model = tiny_model(
        "llama", seed=3, tokenizer=characters("abcde"), vocab_size=5, **overrides
    )
    return model, related(model, characters("xdaybc"), noise=0.2, **overrides)


class TestUniversalDraft(StrategyContract):
    strategy = UniversalDraft
    architectures = ("llama", "gpt2")
    params = (
        {"mode": "text", "draft_length": 6, "stop": 0.2},
        {"mode": "intersection", "draft_length": 6, "stop": 0.3},
    )

    def models(self, architecture: str) -> tuple[LanguageModel, LanguageModel]:
        """A tokenizer of more text drafts for one of less."""
        return contract_pair(architecture)

    def toys(self) -> tuple[LanguageModel, LanguageModel]:
        """Characters in another order."""
        return contract_toys()


def start(
    target: Any, draft: Any, controls: Controls | None = None, **params: Any
) -> Any:
    controls = controls or Controls.greedy(400)
    sampler = Sampler(Processors(controls, 1, torch.device("cpu")), controls.seed)
    strategy = UniversalDraft(UniversalDraftParams(**params))
    return strategy.start(Target(target, draft, None, (), sampler, True, perf_counter))


def generate(
    pair: tuple[LanguageModel, LanguageModel],
    prompt: Sequence[int],
    controls: Controls,
    **params: Any,
) -> Any:
    strategy = UniversalDraft(UniversalDraftParams(**params))
    return Engine(*pair).generate(strategy, prompt, controls)


def spelled(tokenizer: Any, ids: Sequence[int]) -> bytes:
    """What byte-level ``ids`` spell, by transformers' own table."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return bytes(OCTETS[character] for name in names for character in name)


def token_id(tokenizer: Any, name: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(name))


class Omniscient:
    """A draft model that continues every text it has read as ``text`` does."""

    name = "omniscient"
    max_length = None
    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.text = text.encode()
        self.fed: list[int] = []

    def new_cache(self, capacity: int) -> Any:
        cache = SimpleNamespace(tokens=[])
        cache.truncate = lambda length: cache.tokens.__delitem__(slice(length, None))
        return cache

    def prefill(self, tokens: Sequence[int], cache: Any) -> Any:
        """One-hot logits of the first token of what is left."""
        self.fed.append(len(tokens))
        cache.tokens += tokens
        read = spelled(self.tokenizer, cache.tokens)
        assert self.text.startswith(read), "the draft was told another text"
        logits = torch.zeros(1, self.vocab_size)
        logits[0, self._next(self.text[len(read) :])] = 1.0
        return SimpleNamespace(logits=logits)

    def _next(self, rest: bytes) -> int:
        if not rest:
            return int(self.tokenizer.eos_token_id)
        text = rest[:32].decode(errors="ignore")
        if not text or 0x80 <= rest[0] < 0xC0:  # within a character
            return token_id(self.tokenizer, NAMES[rest[0]])
        return encoded(self.tokenizer, text)[0]


def encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True
    )["input_ids"]
    return ids


class Stub:
    """A target that is never evaluated."""

    name = "stub"
    device = torch.device("cpu")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)


TEXTS = st.one_of(
    st.lists(st.sampled_from([*HARBOUR, *KITCHEN, HOSTILE]), max_size=3).map("".join),
    st.text(max_size=60),
    st.text(alphabet="aé日😀 \n", max_size=40),
)


@pytest.mark.slow
@given(text=TEXTS, canonical=st.booleans(), data=st.data())
@settings(max_examples=40)
def test_the_draft_reads_what_was_committed_and_drafts_what_follows_it(
    text: str, canonical: bool, data: st.DataObject
) -> None:
    text = "." + text  # the draft must have read something before it drafts
    harbour, kitchen = byte_level("harbour", 330), byte_level("kitchen", 310)
    ids = encoded(harbour, text)
    if not canonical:
        ids = [token_id(harbour, NAMES[byte]) for byte in text.encode()]
    drafter = start(
        Stub(harbour), Omniscient(kitchen, text), mode="text", draft_length=12
    )
    done = 1
    while done < len(ids):
        drafted = drafter.propose(Context(ids[:done], 400, 128, 0)).tokens[1:]
        rest = spelled(harbour, ids[done:])
        if drafted[-1:] == (harbour.eos_token_id,):
            assert spelled(harbour, drafted[:-1]) == rest
        else:
            assert drafted
            assert rest.startswith(spelled(harbour, drafted))
        done += data.draw(st.integers(1, 5))


@pytest.mark.parametrize(
    ("committed", "whole", "proposed"),
    [
        (b".\xe6\x97", b".\xe6\x97\xa5!", b"\xa5!<eos>"),
        (b".\xe6\x97", b".xyz", b""),
        (b".", b".ab\xe6\x97", b"ab"),
    ],
    ids=["finished", "another character begun", "the draft ends within one"],
)
def test_characters_cut_in_two_by_either_side_are_never_proposed_in_part(
    committed: bytes, whole: bytes, proposed: bytes
) -> None:
    harbour, kitchen = byte_level("harbour", 330), byte_level("kitchen", 310)
    draft = Omniscient(kitchen, "")
    draft.text = whole
    drafter = start(Stub(harbour), draft, mode="text", draft_length=12)
    ids = [token_id(harbour, NAMES[byte]) for byte in committed]
    tree = drafter.propose(Context(ids, 40, 128, 0))
    assert spelled(harbour, tree.tokens[1:]) == proposed


@pytest.mark.parametrize("k", [5, 12])
def test_proposed_text_is_cut_into_tokens_where_the_target_cuts_it(k: int) -> None:
    harbour, kitchen = byte_level("harbour", 330), byte_level("kitchen", 310)
    text = " ".join([*HARBOUR, *KITCHEN[:3]])
    ids = encoded(harbour, text)
    drafter = start(
        Stub(harbour), Omniscient(kitchen, text), mode="text", draft_length=k
    )
    done, steps = 1, 0
    while done < len(ids) - 12:
        drafted = drafter.propose(Context(ids[:done], 400, 128, 0)).tokens[1:]
        words = spelled(harbour, drafted).rsplit(b" ", 1)[0]
        kept = 0
        while kept < len(drafted) and drafted[kept] == ids[done + kept]:
            kept += 1
        # All but the word that the draft stopped in the middle of.
        assert len(spelled(harbour, drafted[:kept])) >= len(words) or b" " not in words
        done, steps = done + kept + 1, steps + 1
    assert steps < len(ids) / 3


@pytest.mark.slow
def test_a_growing_text_is_read_as_the_drafts_tokenizer_reads_the_whole() -> None:
    harbour, kitchen = byte_level("harbour", 330), byte_level("kitchen", 310)
    text = " ".join([*HARBOUR, HOSTILE, *KITCHEN])
    ids = encoded(harbour, text)
    draft = Omniscient(kitchen, text)
    drafter = start(Stub(harbour), draft, mode="text", draft_length=3)
    for done in range(1, len(ids)):
        drafter.propose(Context(ids[:done], 400, 128, 0))
        known = spelled(harbour, ids[:done]).decode(errors="ignore")
        # Where a word isn't finished, its tokens may yet change.
        assert drafter._reading.ids[:-4] == encoded(kitchen, known)[:-4]
    # Never more evaluated anew than what can be cut otherwise.
    assert max(draft.fed) <= LOOKBEHIND


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("composed", [False, True])
def test_a_step_encodes_no_more_than_the_last_tokens_of_a_long_text(
    monkeypatch: pytest.MonkeyPatch, mode: str, composed: bool
) -> None:
    harbour = byte_level("harbour", 330)
    # A tokenizer that composes characters disagrees about where the bytes are.
    text = " ".join(HARBOUR + ["e\u0301"] * 40) * 20
    ids = encoded(harbour, text)
    target = Stub(harbour)
    draft = related(
        tiny_model("llama", tokenizer=harbour, vocab_size=len(harbour)),
        marked(120, composed=composed),
    )
    drafter = start(target, draft, mode=mode, draft_length=1)
    drafter._reading.extend(ids[:-40])
    lengths: list[int] = []
    encode = Vocabulary._encode

    def recording(self: Vocabulary, text: str) -> list[int]:
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Vocabulary, "_encode", recording)
    for done in range(len(ids) - 39, len(ids)):
        drafter._reading.extend(ids[:done])
    longest = max(len(spelled(harbour, [token])) for token in set(ids))
    assert max(lengths, default=0) <= (LONGEST_TAIL + 1) * longest
    assert lengths or mode == "intersection"


@pytest.mark.slow
@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swapped", [False, True])
def test_output_is_plain_decodings_beside_a_tokenizer_that_marks_or_changes_text(
    mode: str, composed: bool, swapped: bool
) -> None:
    tokenizers = [byte_level("harbour", 330), marked(120, composed=composed)]
    mine, other = reversed(tokenizers) if swapped else tokenizers
    target = tiny_model("llama", tokenizer=mine, vocab_size=len(mine))
    draft = related(target, other)
    prompt = encoded(mine, HOSTILE)
    for controls in (
        Controls.greedy(30),
        Controls(max_new_tokens=30, temperature=0.7, seed=6),
    ):
        run = generate((target, draft), prompt, controls, mode=mode)
        if mode == "text" or not controls.temperature:
            expected = Engine(target).generate(Autoregressive(), prompt, controls)
            assert run.token_ids == expected.token_ids
        assert run.stats.proposed > 0


@pytest.mark.parametrize("swapped", [False, True])
def test_sentencepiece_spaces_and_bytes_are_read_by_a_byte_level_tokenizer_and_back(
    swapped: bool,
) -> None:
    mine, other = byte_level("kitchen", 310), marked(120)
    if swapped:
        mine, other = other, mine
    target = tiny_model("llama", tokenizer=mine, vocab_size=len(mine))
    draft = related(target, other)
    text = "Wait for 日本 bread, naïve 😀 dough."
    ids = mine(text)["input_ids"]
    drafter = start(target, draft, mode="text", draft_length=1)
    for done in range(1, len(ids) + 1):
        drafter.propose(Context(ids[:done], 400, 128, 0))
    read = other.decode(drafter._reading.ids, skip_special_tokens=True)
    assert str(read).strip() == text


def mapped(name: str, **specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer of its own object, with more special tokens."""
    inner = Tokenizer.from_str(byte_level(name, 300).backend_tokenizer.to_str())
    tokenizer = wrapped(inner)
    tokenizer.add_special_tokens(specials)  # type: ignore[arg-type]
    return tokenizer


def test_special_tokens_are_read_by_name_or_role_and_their_names_as_text() -> None:
    mine = mapped("harbour", eos_token="<|im_end|>", bos_token="<|start|>")
    other = mapped("kitchen", eos_token="</s>", bos_token="<s>")
    target = tiny_model("llama", tokenizer=mine, vocab_size=len(mine))
    draft = related(target, other)
    names = ("<|start|>", "<|im_end|>", "<sep>", "<eos>")
    bos, eos, sep, alone = (token_id(mine, name) for name in names)
    text = encoded(mine, "a </s><sep> b")
    for mode in MODES:
        drafter = start(target, draft, mode=mode, draft_length=1)
        drafter.propose(Context([bos, *text, sep, alone, eos, *text], 9, 9, 0))
        kinds = [
            other.convert_ids_to_tokens(token)
            for token in drafter._reading.ids
            if token in other.all_special_ids or token < 2
        ]
        assert kinds == ["<s>", "<sep>", "</s>"]
        spelt = [t for t in drafter._reading.ids if t not in other.all_special_ids]
        spelt = [t for t in spelt if t >= 2]
        assert spelled(other, spelt) == b"a </s><sep> b" * 2


@pytest.mark.parametrize("mode", MODES)
def test_the_drafts_own_end_of_text_is_proposed_as_the_targets(mode: str) -> None:
    harbour, kitchen = byte_level("harbour", 330), byte_level("kitchen", 310)
    text = "Fresh bread"
    ids = encoded(harbour, text)
    drafter = start(
        Stub(harbour), Omniscient(kitchen, text), mode=mode, draft_length=12
    )
    tree = drafter.propose(Context(ids, 40, 128, 0))
    assert list(tree.tokens) == [ids[-1], harbour.eos_token_id]


@pytest.mark.parametrize("mode", MODES)
def test_a_text_that_the_draft_cannot_read_at_all_gets_no_draft(mode: str) -> None:
    drafter = start(*contract_pair("llama"), mode=mode)
    assert drafter.propose(Context([63, 62], 9, 9, 0)).proposed == 0  # past its tokens
    assert drafter.propose(Context([63, 62, 9], 9, 9, 0)).proposed > 0


ALPHABET = "etaoinshrdlucmfwypvbgkqjxz0123456789ETAOINSHRDLUCMFWYPVBGKQJXZ.,"


@functools.cache
def permuted() -> tuple[LanguageModel, LanguageModel, LanguageModel]:
    """A target, a draft of its own characters, and the same draft in another order."""
    target = tiny_model("llama", tokenizer=characters(ALPHABET))
    draft = noisy_draft(target)
    other = characters(ALPHABET[::-1])
    return target, draft, related(draft, other, noise=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "params", [{"draft_length": 4}, {"draft_length": 8, "stop": 0.5}]
)
@pytest.mark.parametrize("mode", MODES)
def test_characters_in_another_order_draft_what_the_same_characters_draft(
    mode: str, params: dict[str, Any]
) -> None:
    target, draft, other = permuted()
    prompt = random_ids(11, seed=4)
    controls = Controls.greedy(60)
    strategy = DraftModel(DraftModelParams(**params))
    expected = Engine(target, draft).generate(strategy, prompt, controls)
    found = generate((target, other), prompt, controls, mode=mode, **params)
    assert found.token_ids == expected.token_ids
    assert [(s.proposed, s.accepted) for s in found.stats.steps] == [
        (s.proposed, s.accepted) for s in expected.stats.steps
    ]
    assert 0 < found.stats.accepted < found.stats.proposed


def test_sampled_characters_in_another_order_have_the_same_distributions() -> None:
    target, draft, other = permuted()
    prompt = random_ids(11, seed=4)
    controls = Controls(
        max_new_tokens=9, temperature=0.9, top_k=9, repetition_penalty=1.2
    )
    sampler = Sampler(Processors(controls, len(prompt), target.device), 0)
    same = DraftModel(DraftModelParams(draft_length=1)).start(
        Target(target, draft, None, (), sampler, True, perf_counter)
    )
    context = Context(prompt, 9, 128, 0)
    expected = same.propose(context).draft_probs[1]
    tree = start(target, other, controls, mode="intersection", draft_length=1).propose(
        context
    )
    assert tree.drawn is Drawn.INDEPENDENT
    torch.testing.assert_close(tree.draft_probs[1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_drafts_cache_holds_what_it_has_read_after_every_rejection(
    monkeypatch: pytest.MonkeyPatch, fresh_logits: FreshLogits, mode: str
) -> None:
    pair = contract_pair("llama")
    compared: list[int] = []
    feed = _Sequence.feed

    def checked(self: _Sequence, tokens: Sequence[int]) -> torch.Tensor:
        logits = feed(self, tokens)
        expected = fresh_logits(self._model, list(self._tokens))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        compared.append(len(tokens))
        return logits

    read = _Sequence.read

    def whole(self: _Sequence, ids: Sequence[int], same: int) -> torch.Tensor:
        logits = read(self, ids, same)
        assert self._tokens == list(ids)
        return logits

    monkeypatch.setattr(_Sequence, "read", whole)
    monkeypatch.setattr(_Sequence, "feed", checked)
    prompt = random_ids(30, seed=5, vocab_size=60)
    stats = generate(pair, prompt, Controls.greedy(40), mode=mode).stats
    assert len(compared) >= len(stats.steps)
    assert len({step.accepted for step in stats.steps}) > 1
    assert max(compared[1:]) <= 3 * LOOKBEHIND


@pytest.mark.parametrize("seed", range(5))
def test_text_drafts_emit_plain_samplings_tokens(seed: int) -> None:
    target, _, other = permuted()
    controls = Controls(max_new_tokens=40, temperature=0.8, top_p=0.9, seed=seed)
    prompt = random_ids(9, seed=seed)
    run = generate((target, other), prompt, controls, mode="text")
    expected = Engine(target).generate(Autoregressive(), prompt, controls)
    assert run.token_ids == expected.token_ids
    assert run.stats.accepted > 0


class Misreporting(UniversalDraft):
    """Claims that its tokens were drawn from all tokens alike."""

    name = "misreporting"

    def start(self, target: Target) -> Drafter:
        honest = super().start(target)

        class Flattened(Drafter):
            def propose(self, context: Context) -> TokenTree:
                tree = honest.propose(context)
                draft_probs = [tree.draft_probs[n] for n in range(1, len(tree))]
                flat = [torch.full_like(probs, 1 / len(probs)) for probs in draft_probs]
                return TokenTree.chain(
                    tree.tokens[0], tree.tokens[1:], Drawn.INDEPENDENT, flat
                )

        return Flattened()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "exact"),
    [
        (
            UniversalDraft(UniversalDraftParams(mode="intersection", draft_length=2)),
            True,
        ),
        (
            Misreporting(UniversalDraftParams(mode="intersection", draft_length=2)),
            False,
        ),
    ],
    ids=["intersection", "negative control"],
)
def test_sampled_output_has_the_targets_distribution(
    strategy: UniversalDraft, exact: bool
) -> None:
    target, draft = contract_toys()
    engine = Engine(target, draft)
    counts = Counter(
        tuple(
            engine.generate(
                strategy,
                [1, 2],
                Controls(max_new_tokens=3, temperature=HOT, seed=seed),
            ).token_ids[1:3]
        )
        for seed in range(300)
    )
    p_value = chi_square(counts, toy_distribution(target, [1, 2], HOT))
    assert p_value > 1e-3 if exact else p_value < 1e-6


def test_no_token_outside_both_vocabularies_is_ever_drafted() -> None:
    target, draft = contract_toys()
    controls = Controls(max_new_tokens=9, temperature=HOT, seed=0)
    drafter = start(target, draft, controls, mode="intersection", draft_length=1)
    tree = drafter.propose(Context([1, 2], 9, 128, 0))
    assert float(tree.draft_probs[1][4]) == 0.0  # "e", which the draft hasn't
    assert float(tree.draft_probs[1].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vocabularies_without_a_common_token_propose_nothing(
    temperature: float,
) -> None:
    target = tiny_model("llama", tokenizer=characters("abcde"), vocab_size=5)
    draft = related(target, characters("vwxyz"))
    controls = Controls(max_new_tokens=7, temperature=temperature, seed=0)
    run = generate((target, draft), [1, 2], controls, mode="intersection")
    expected = Engine(target).generate(Autoregressive(), [1, 2], controls)
    assert run.token_ids == expected.token_ids
    assert run.stats.proposed == 0


@pytest.mark.parametrize("mode", MODES)
def test_drafting_ends_where_the_draft_models_positions_end(mode: str) -> None:
    target = permuted()[0]
    prompt = random_ids(13, seed=2)
    short = related(target, characters(ALPHABET[::-1]), max_position_embeddings=19)
    run = generate((target, short), prompt, Controls.greedy(20), mode=mode)
    expected = Engine(target).generate(Autoregressive(), prompt, Controls.greedy(20))
    assert run.token_ids == expected.token_ids
    proposed = [step.proposed for step in run.stats.steps]
    assert proposed[0] == 4
    assert proposed[-3:] == [0, 0, 0]


@pytest.mark.slow
def test_reasons_why_it_cannot_run_name_the_way_out() -> None:
    model, draft = contract_pair("llama")
    unread = noisy_draft(tiny_model("llama"))
    words = tiny_model("llama", tokenizer=tiny_tokenizer())
    foreign = tiny_model("llama")
    foreign.tokenizer = object()
    mamba = tiny_model("mamba", tokenizer=byte_level("kitchen", 70))
    assert UniversalDraft.unavailable(model, draft) is None
    for target, other, expected in (
        (model, None, "--draft-model"),
        (model, unread, "llama-draft has none"),
        (unread, draft, "llama-draft has none"),
        (model, noisy_draft(model), "use draft_model"),
        (model, words, "byte for byte"),
        (words, model, "byte for byte"),
        (model, foreign, "get_vocab"),
        (model, mamba, "the draft model can't roll back"),
        (mamba, draft, "the target can't verify drafts"),
    ):
        reason = UniversalDraft.unavailable(target, other)
        assert reason is not None
        assert expected in reason
    with pytest.raises(UnavailableStrategyError, match="universal_draft: needs"):
        Engine(model).generate(UniversalDraft(), [1], Controls.greedy(1))
