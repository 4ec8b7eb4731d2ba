"""Tiny random models and scripted stand-ins, for tests that need no download."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from adaptspec.model.language_model import LanguageModel
from adaptspec.strategy import (
    Context,
    Drafter,
    Outcome,
    Strategy,
    Target,
    TokenTree,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB = 64
WINDOW = 8  # of the sliding-window models; prompts of more tokens leave it behind
POSITIONS = 256

# Large enough that attention matters and greedy output varies.
SPREAD = 0.4

_NO_SPECIALS: dict[str, Any] = {
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": SPREAD,
    "tie_word_embeddings": False,
    **_NO_SPECIALS,
}


@dataclass(frozen=True)
class Architecture:
    """How to configure a tiny model of one kind."""

    config: str  # class name in transformers
    arguments: dict[str, Any]


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", _LLAMA_LIKE),
    "qwen2": Architecture("Qwen2Config", _LLAMA_LIKE),
    "qwen3": Architecture("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "mistral": Architecture("MistralConfig", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "gpt2": Architecture(
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": POSITIONS,
            "initializer_range": SPREAD,
            **_NO_SPECIALS,
        },
    ),
    "gpt_neox": Architecture(
        "GPTNeoXConfig",
        {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"},
    ),
    "phi": Architecture("PhiConfig", _LLAMA_LIKE),
    "opt": Architecture(
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "init_std": SPREAD,
            "tie_word_embeddings": False,
            **_NO_SPECIALS,
            "pad_token_id": 1,
        },
    ),
    "mixtral": Architecture(
        "MixtralConfig",
        {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "falcon": Architecture(
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": False,
            "max_position_embeddings": POSITIONS,
            "initializer_range": SPREAD,
            "tie_word_embeddings": False,
            **_NO_SPECIALS,
        },
    ),
    # Linear position biases, computed from the mask: no tree fits them.
    "bloom": Architecture(
        "BloomConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": SPREAD,
            "tie_word_embeddings": False,
            **_NO_SPECIALS,
        },
    ),
    # A recurrent state can't be rolled back.
    "mamba": Architecture(
        "MambaConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "initializer_range": SPREAD,
            **_NO_SPECIALS,
        },
    ),
}


def tiny_module(architecture: str, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model in float32, of one of :data:`ARCHITECTURES`.

    ``overrides`` replace arguments of its configuration.
    """
    import transformers

    known = ARCHITECTURES[architecture]
    arguments = {**copy.deepcopy(known.arguments), **overrides}
    config = getattr(transformers, known.config)(**arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return module.float().eval()


def tiny_model(
    architecture: str, seed: int = 0, tokenizer: Any = None, **overrides: Any
) -> LanguageModel:
    """The same as the decoding core uses it; the module is its ``source``."""
    module = tiny_module(architecture, seed, **overrides)
    return LanguageModel(module, tokenizer, architecture)


def noisy_draft(
    model: LanguageModel, noise: float = 0.02, seed: int = 1
) -> LanguageModel:
    """A draft for ``model``: its weights with noise, often but not always right."""
    module = copy.deepcopy(model.source)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(drawn.to(parameter) * noise)
    return LanguageModel(module, model.tokenizer, f"{model.name}-draft")


def random_ids(count: int, seed: int = 0, vocab_size: int = VOCAB) -> list[int]:
    """A prompt of ``count`` tokens; the lowest ids, often special, are left out."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, vocab_size, (count,), generator=generator)
    return [int(token) for token in drawn]


def hf_greedy(
    model: LanguageModel,
    ids: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
) -> list[int]:
    """What the model's own ``generate`` emits after ``ids``."""
    output = model.source.generate(  # type: ignore[operator]
        torch.tensor([list(ids)], device=model.device),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=0,
    )
    return [int(token) for token in output[0, len(ids) :]]


def tiny_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: ``<eos>`` is 0, ``<unk>`` 1, then ``w2 w3...``.

    It has a chat template of one line per message.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(2, vocab_size))]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    )
    return tokenizer


class FakeClock:
    """Time that passes only when told to, and a fixed amount at each look.

    Args:
        start: Seconds it begins with.
        tick: Seconds that pass at each call.
    """

    def __init__(self, start: float = 0.0, tick: float = 0.0) -> None:
        self.now = start
        self.tick = tick

    def __call__(self) -> float:
        """The time, before the tick passes."""
        now = self.now
        self.now += self.tick
        return now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


class ScriptedStrategy(Strategy):
    """Proposes what a function of the context says, and remembers what happened.

    Args:
        script: ``context -> tree``.
    """

    name = "scripted"
    summary = "proposes what the test says"

    def __init__(self, script: Callable[[Context], TokenTree]) -> None:
        super().__init__()
        self.script = script
        self.outcomes: list[Outcome] = []
        self.opened = 0
        self.closed = 0

    @classmethod
    def unavailable(
        cls, model: LanguageModel, draft: LanguageModel | None
    ) -> str | None:
        """Never: on a model that verifies nothing its proposals are ignored."""
        return None

    def start(self, target: Target) -> Drafter:
        """Count the sequence."""
        self.opened += 1
        return _Scripted(self)


class _Scripted(Drafter):
    def __init__(self, strategy: ScriptedStrategy) -> None:
        self._strategy = strategy

    def propose(self, context: Context) -> TokenTree:
        return self._strategy.script(context)

    def observe(self, outcome: Outcome) -> None:
        self._strategy.outcomes.append(outcome)

    def close(self) -> None:
        self._strategy.closed += 1
