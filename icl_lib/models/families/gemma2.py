"""Gemma 2: Gemma with norms behind the branches, soft caps, and windows in every other layer."""

from typing import Any

from icl_lib.models.config import ModelConfig
from icl_lib.models.families import gemma, qwen2
from icl_lib.models.families.base import NAMES, Family, Keys

_DEFAULTS = gemma.DEFAULTS | {
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
_TRAITS = {"post_norms": True, "attn_softcap": 50.0, "logit_softcap": 30.0}
_NAMES = NAMES | {
    "ln1_post.weight": "post_attention_layernorm.weight",
    "ln2.weight": "pre_feedforward_layernorm.weight",
    "ln2_post.weight": "post_feedforward_layernorm.weight",
}


def _read(keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    keys.activation("hidden_activation", gemma.TANH)
    keys.activation("hidden_act", gemma.TANH)
    size = None if keys["sliding_window"] is None else keys.number("sliding_window", whole=True)
    caps = {"attn_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    bias = keys.flag("attention_bias")
    return {
        "qkv_bias": bias, "out_bias": bias, "attn_scale": keys.number("query_pre_attn_scalar") ** -0.5,
        "windows": keys.windows(size, [i % 2 == 0 for i in range(sizes["n_layers"])]),
    } | {ours: None if keys[key] is None else keys.number(key) for ours, key in caps.items()}  # fmt: skip


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = qwen2.FAMILY.write(config)
    return gemma.FAMILY.write(config) | {
        "query_pre_attn_scalar": config.d_head if config.attn_scale is None else round(config.attn_scale**-2),
        "attn_logit_softcapping": config.attn_softcap, "final_logit_softcapping": config.logit_softcap,
        "sliding_window": windows["sliding_window"], "layer_types": windows["layer_types"],
    }  # fmt: skip


FAMILY = Family("gemma2", "Gemma2", _DEFAULTS, _TRAITS, _read, _write, _NAMES)
