"""Every causal LM class of the installed transformers, tiny and random.

A family's own default configuration is kept but for its sizes: :data:`SIZES` shrinks
fields by name, :data:`EXCEPTIONS` what doesn't fit together otherwise.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaptspec.testing.fakes import SPREAD, VOCAB, random_ids

# One token; a few; up to and beyond a window of 16; text that repeats itself.
PROMPTS: tuple[tuple[int, ...], ...] = (
    (7,),
    tuple(random_ids(5, seed=1)),
    tuple(random_ids(12, seed=2)),
    tuple(random_ids(9, seed=3)) * 3,
    tuple(random_ids(39, seed=4)),
)
WINDOW_POSITIONS = 16  # positions a layer with a window or chunks attends to
MOST_POSITIONS = 256
# A model is drawn again, with more noise, until it says so many different tokens.
DIFFERENT_TOKENS = 6
NOISES = (0.0, 0.0, 0.0, 0.2, 0.4, 0.8, 0.8)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 32, 4, 2, 8, 64
FEWEST_LAYERS = 2
EXPERTS, CHOSEN_EXPERTS = 4, 2
STATE_SIZE = 8

_NAMES: tuple[tuple[int, str], ...] = (
    (
        VOCAB,
        "vocab_size vocab_size_per_layer_input unpadded_vocab_size "
        "decoder_vocab_size output_vocab_size",
    ),
    (
        HIDDEN,
        "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim "
        "attention_hidden_size lru_width input_embedding_size "
        "output_embedding_size backbone_hidden_size cross_attention_hidden_size",
    ),
    (
        FEWEST_LAYERS,
        "num_hidden_layers n_layer n_layers num_layers num_blocks "
        "decoder_layers encoder_layers num_decoder_layers num_encoder_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads attention_heads "
        "decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads num_heads "
        "swa_num_attention_heads linear_num_value_heads linear_num_heads "
        "index_n_heads indexer_n_heads",
    ),
    (
        KV_HEADS,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads "
        "linear_num_key_heads num_global_key_value_heads indexer_kv_heads",
    ),
    (
        HEAD_DIM,
        "head_dim swa_head_dim global_head_dim d_head dim_head kv_channels "
        "qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim "
        "index_head_dim indexer_head_dim attention_head_size "
        "query_pre_attn_scalar rotary_dim mamba_head_dim d_rel",
    ),
    (
        INNER,
        "intermediate_size ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size "
        "expert_ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
        "feed_forward_size moe_intermediate_size "
        "shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size "
        "prefix_dense_intermediate_size dense_intermediate_size "
        "intermediate_size_mlp",
    ),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (
        CHOSEN_EXPERTS,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts n_group "
        "topk_group num_dense_layers first_k_dense_replace n_groups "
        "mamba_n_groups mamba_ngroups max_window_layers moe_layer_start_index",
    ),
    (
        MOST_POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length "
        "max_target_positions",
    ),
    (
        WINDOW_POSITIONS,
        "sliding_window sliding_window_size window_size attention_window_size "
        "attention_chunk_size local_attention chunk_size mamba_chunk_size "
        "block_size index_block_size keep_window_size rel_extent "
        "local_attn_chunk_length lsh_attn_chunk_length "
        "local_attention_window_len log_scaling_n_floor floor_scale",
    ),
    (
        STATE_SIZE,
        "q_lora_rank kv_lora_rank state_size ssm_state_size mamba_d_state "
        "laurel_rank gated_norm_rank loop_gate_rank hc_lowrank o_lora_rank "
        "adapter_rank index_topk hidden_size_per_layer_input router_hidden_size",
    ),
)
SIZES: dict[str, Any] = {
    name: value for value, names in _NAMES for name in names.split()
} | {
    "initializer_range": SPREAD,
    "init_std": SPREAD,
    "embed_init_std": SPREAD,
    "initializer_factor": 1.0,
    "is_decoder": True,
    "use_sliding_window": True,
    "use_cache": True,
    "tie_word_embeddings": False,  # a tied random model repeats its input
}
# Also where a configuration leaves them None.
_SET_THOUGH_NONE = frozenset(
    {
        "head_dim",
        "is_decoder",
        "moe_intermediate_size",
        "num_experts_per_tok",
        "num_key_value_heads",
    }
)
# Ids of text; those of pictures and sounds stay beyond the tiny vocabulary.
_IDS = frozenset(
    f"{name}_token_id"
    for name in "bos cls decoder_start eod eos forced_eos mask pad sep".split()
)


def families() -> list[str]:
    """Model types of every causal LM of the installed transformers."""
    from transformers.models.auto import modeling_auto

    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def case_names() -> list[str]:
    """Every family, then the variants."""
    return [*families(), *VARIANTS]


def class_name(case: str) -> str:
    """The class that ``AutoModelForCausalLM`` builds."""
    from transformers.models.auto import modeling_auto

    name: str = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[case.split("+")[0]]
    return name


def prompts_of(case: str) -> tuple[tuple[int, ...], ...]:
    """What the family is asked to continue."""
    return PROMPTS + VARIANTS[case].prompts if case in VARIANTS else PROMPTS


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The family's configuration with tiny sizes."""
    from transformers import CONFIG_MAPPING

    changes = {**EXCEPTIONS.get(model_type, {}), **overrides}
    return _shrunk(CONFIG_MAPPING[model_type], changes)


def tiny_module(case: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model in float32 that says varied things.

    Args:
        case: Of :func:`case_names`.
        overrides: Of its configuration's arguments.
    """
    from transformers import AutoModelForCausalLM

    if case in VARIANTS:
        overrides = {**VARIANTS[case].overrides, **overrides}
    config = tiny_config(case.split("+")[0], **overrides)
    most, best = -1, None
    for attempt, noise in enumerate(NOISES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + attempt)
            module = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
            _disturb(module, noise)
        module = module.float().eval()
        varied = _varied(copy.deepcopy(module))
        if varied > most:
            most, best = varied, module
        if varied >= DIFFERENT_TOKENS:
            break
    return best


def _disturb(module: Any, noise: float) -> None:
    """Give weights that are ones and zeros at first, such as norms', an effect.

    ``noise`` is added to matrices, which some families start too small to matter.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                scale = 0.1 if parameter.dim() == 1 else noise
                parameter.add_(torch.randn_like(parameter) * scale)


def _varied(module: Any) -> int:
    """How many different tokens the model says after a short prompt."""
    ids = torch.tensor([PROMPTS[1]])
    try:
        output = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3 * DIFFERENT_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    except Exception:  # whoever decodes with it will see the same, and say so
        return DIFFERENT_TOKENS
    return len(set(output[0, ids.shape[1] :].tolist()))


def _shrunk(cls: Any, changes: Mapping[str, Any]) -> Any:
    """A configuration of ``cls`` with tiny sizes and ``changes``."""
    arguments: dict[str, Any] = {}
    defaults = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in defaults.items():
        default = field.default
        if name in _IDS:
            arguments[name] = None if "None" in str(field.type) else 0
            if name == "pad_token_id" and isinstance(default, int) and default < VOCAB:
                arguments[name] = default  # positions may be counted from it
        elif name in SIZES and (default is not None or name in _SET_THOUGH_NONE):
            arguments[name] = SIZES[name]
    for name, spec in getattr(cls, "sub_configs_defaults", {}).items():
        if name in changes and not isinstance(changes[name], Mapping):
            continue
        arguments[name] = _shrunk(
            spec.get_config_class(spec.model_type)
            if not issubclass(spec.config_class, _base())
            else spec.config_class,
            changes.get(name, {}),
        )
    nested = {k for k in changes if k in arguments and isinstance(changes[k], Mapping)}
    arguments.update({k: v for k, v in changes.items() if k not in nested})
    if "kv_lora_rank" in defaults and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = HEADS
    if not ({"layer_types", "num_hidden_layers"} & set(changes)):
        _cover_layer_types(cls, defaults, arguments)
    return cls(**copy.deepcopy(arguments))


def _cover_layer_types(
    cls: Any, defaults: Mapping[str, Any], arguments: dict[str, Any]
) -> None:
    """Have each kind of layer that the family's default has, in its order."""
    if "num_hidden_layers" not in arguments:
        return
    found: dict[str, list[str]] = {}
    try:
        default = cls()
    except Exception:
        return
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds: list[str] = getattr(default, name, None) or []
        if name in defaults and len(set(kinds)) > 1:
            found[name] = list(dict.fromkeys(kinds))
    if not found:
        return
    layers = max(FEWEST_LAYERS, *(len(kinds) for kinds in found.values()))
    arguments["num_hidden_layers"] = layers
    for name, kinds in found.items():
        arguments[name] = (kinds * layers)[:layers]


def _base() -> Any:
    from transformers import PreTrainedConfig

    return PreTrainedConfig


_MIXED = ["sliding_attention", "full_attention"]
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
# What names alone don't settle, by model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": _MIXED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _MIXED
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1},
    "dots3_note": {
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": _MIXED * 2,
    },
    "gemma4": {"text_config": {"pad_token_id": 0}},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
        }
    },
    "gemma4_unified": {"text_config": {"pad_token_id": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hrm_text": {"initializer_range": 0.1},  # more, and its loops amplify rounding
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _MIXED, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": _MIXED},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "prophetnet": {"pad_token_id": 0},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": WINDOW_POSITIONS,
            "indexer_compress_ratio": 4,
        }
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "pad_token_id": 0,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB,
        "shape_vocab_size": VOCAB,
        "pronunciation_embed_dim": HIDDEN,
        "shape_embed_dim": HIDDEN,
    },
    "xlm": {"mask_token_id": 5, "pad_token_id": 2},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "sliding_window": WINDOW_POSITIONS,
    },
}
EXCEPTIONS["qwen4_exp_text"] = EXCEPTIONS["qwen4_exp"]["text_config"]


@dataclass(frozen=True)
class Variant:
    """A family in another configuration than its default one.

    Args:
        overrides: Of the configuration's arguments.
        prompts: More than every family is asked.
    """

    overrides: Mapping[str, Any]
    prompts: tuple[tuple[int, ...], ...] = ()


_BOUNDARY = 32
_ACROSS = (tuple(random_ids(_BOUNDARY - 4, seed=5)),)
_FAR = tuple(tuple(random_ids(count, seed=6)) for count in (76, 100))


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_LONG = {
    "short_factor": [1.0] * (HEAD_DIM // 2),
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": _BOUNDARY,
}
VARIANTS: dict[str, Variant] = {
    "phi3+longrope": Variant(
        {**_rope("longrope", **_LONG), "original_max_position_embeddings": _BOUNDARY},
        _ACROSS,
    ),
    "phi3+window": Variant({"sliding_window": WINDOW_POSITIONS}),
    "llama+dynamic": Variant(
        {**_rope("dynamic", factor=4.0), "max_position_embeddings": _BOUNDARY}, _ACROSS
    ),
    "llama+yarn": Variant(
        {
            **_rope("yarn", factor=4.0, original_max_position_embeddings=_BOUNDARY),
            "max_position_embeddings": _BOUNDARY,
        },
        _ACROSS,
    ),
    "llama+llama3": Variant(
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=_BOUNDARY,
        ),
        _ACROSS,
    ),
    "falcon+alibi": Variant({"alibi": True}),
    "gpt_neo+window80": Variant({"window_size": 80}, _FAR),
    "mistral+window80": Variant({"sliding_window": 80}, _FAR),
    "llama4+chunk80": Variant({"attention_chunk_size": 80}, _FAR),
}
