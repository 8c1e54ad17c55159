"""Gemma: RMS norms whose weight is the gain minus one, gated tanh GELU, and a scaled embedding that also unembeds."""

from typing import Any

from icl_lib.models.config import ModelConfig
from icl_lib.models.families.base import Family, Keys

TANH = "gelu_pytorch_tanh"
DEFAULTS = {
    "hidden_act": TANH, "hidden_activation": TANH, "max_position_embeddings": 8192, "num_key_value_heads": 16,
    "head_dim": 256, "rms_norm_eps": 1e-6, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip


def _read(keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    if keys["hidden_activation"] is not None:
        keys.activation("hidden_activation", TANH)
    keys.activation("hidden_act", TANH, "gelu")  # the first configs say "gelu" and mean the tanh approximation
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"hidden_activation": TANH}


FAMILY = Family("gemma", "Gemma", DEFAULTS, {}, _read, _write)
