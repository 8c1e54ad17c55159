"""Llama: RMS norms, gated SiLU, biases only where the config asks for them."""

from typing import Any

from icl_lib.models.config import ModelConfig
from icl_lib.models.families.base import ACTIVATIONS, Family, Keys

TRAITS = {"norm_offset": 0.0, "activation": "silu", "scale_embed": False, "tied": False}
DEFAULTS = {
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def _read(keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    bias = keys.flag("attention_bias")
    return {
        "activation": keys.activation("hidden_act", *ACTIVATIONS),
        "qkv_bias": bias, "out_bias": bias, "mlp_bias": keys.flag("mlp_bias"),
    }  # fmt: skip


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"mlp_bias": config.mlp_bias}


FAMILY = Family("llama", "Llama", DEFAULTS, TRAITS, _read, _write)
