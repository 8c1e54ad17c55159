"""Phi 3: Llama with fused tensors, q over k over v and gate over up, and one window for all layers."""

from typing import Any

import numpy as np

from icl_lib.models.config import ModelConfig
from icl_lib.models.families import llama
from icl_lib.models.families.base import ACTIVATIONS, NAMES, Family, Keys

_DEFAULTS = {
    "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 32000, "pad_token_id": 32000, "tie_word_embeddings": False, "partial_rotary_factor": 1.0,
}  # fmt: skip
_NAMES = (
    NAMES
    | {f"attn.{x}": "self_attn.qkv_proj.weight" for x in "qkv"}
    | {f"mlp.{x}": "mlp.gate_up_proj.weight" for x in ("gate", "up")}
)


def _rows(config: ModelConfig) -> dict[str, np.ndarray]:
    width, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    q, k, v = np.split(np.arange(width + 2 * kv), [width, width + kv])
    gate, up = np.split(np.arange(2 * config.d_mlp), 2)
    return {"attn.q": q, "attn.k": k, "attn.v": v, "mlp.gate": gate, "mlp.up": up}


def _read(keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    size = None if keys["sliding_window"] is None else keys.number("sliding_window", whole=True)
    kind = "full_attention" if size is None else "sliding_attention"
    keys.only("layer_types", [kind] * sizes["n_layers"])
    windows = None if size is None else (size,) * sizes["n_layers"]
    return {"activation": keys.activation("hidden_act", *ACTIVATIONS), "windows": windows}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "sliding_window": None if config.windows is None else config.windows[0],
        "original_max_position_embeddings": config.n_ctx,
    }


FAMILY = Family(
    "phi3", "Phi3", _DEFAULTS, llama.TRAITS, _read, _write, _NAMES, rows=_rows, rotary_part="partial_rotary_factor"
)
