"""GPT-NeoX and Pythia: layer norms, biases, attention and MLP side by side, and a part of each head that rotates."""

import re
from typing import Any

import numpy as np

from icl_lib.models.config import ModelConfig
from icl_lib.models.families.base import ACTIVATIONS, Family, Keys

_DEFAULTS = {
    "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2,
    "tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True, "rotary_pct": 0.25,
}  # fmt: skip
_TRAITS = {
    "norm": "layer", "norm_offset": 0.0, "activation": "gelu", "gated": False, "scale_embed": False, "tied": False,
    "parallel": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True,
}  # fmt: skip
_NAMES = {
    "embed": "gpt_neox.embed_in.weight",
    "unembed": "embed_out.weight",
    **{f"norm.{x}": f"gpt_neox.final_layer_norm.{x}" for x in ("weight", "bias")},
    **{f"ln1.{x}": f"input_layernorm.{x}" for x in ("weight", "bias")},
    **{f"ln2.{x}": f"post_attention_layernorm.{x}" for x in ("weight", "bias")},
    **{f"attn.{x}": "attention.query_key_value.weight" for x in "qkv"},
    **{f"attn.b_{x}": "attention.query_key_value.bias" for x in "qkv"},
    "attn.o": "attention.dense.weight",
    "attn.b_o": "attention.dense.bias",
    "mlp.up": "mlp.dense_h_to_4h.weight",
    "mlp.b_up": "mlp.dense_h_to_4h.bias",
    "mlp.down": "mlp.dense_4h_to_h.weight",
    "mlp.b_down": "mlp.dense_4h_to_h.bias",
}
_BUFFERS = re.compile(r"(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def _rows(config: ModelConfig) -> dict[str, np.ndarray]:
    """One tensor holds for each head its q, k and v."""
    by_head = np.arange(3 * config.n_heads * config.d_head).reshape(config.n_heads, 3, config.d_head)
    return {f"attn.{b}{x}": by_head[:, i].reshape(-1) for i, x in enumerate("qkv") for b in ("", "b_")}


def _read(keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    keys.only("num_key_value_heads", sizes["n_heads"])
    keys.only("head_dim", sizes["d_model"] // sizes["n_heads"])
    bias = keys.flag("attention_bias")
    return {
        "activation": keys.activation("hidden_act", *ACTIVATIONS),
        "qkv_bias": bias, "out_bias": bias, "parallel": keys.flag("use_parallel_residual"),
    }  # fmt: skip


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"use_parallel_residual": config.parallel}


FAMILY = Family(
    "gpt_neox", "GPTNeoX", _DEFAULTS, _TRAITS, _read, _write, _NAMES, "gpt_neox.layers", _rows, _BUFFERS,
    eps="layer_norm_eps", theta="rotary_emb_base", rotary_part="rotary_pct",
)  # fmt: skip
