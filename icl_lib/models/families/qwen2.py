"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and in some models windows in the upper layers."""

from typing import Any

from icl_lib.models.config import ModelConfig
from icl_lib.models.families import llama
from icl_lib.models.families.base import ACTIVATIONS, Family, Keys

_DEFAULTS = {
    "hidden_act": "silu", "max_position_embeddings": 32768, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


def _read(keys: Keys, sizes: dict[str, Any]) -> dict[str, Any]:
    in_use = keys.flag("use_sliding_window") and keys["sliding_window"] is not None
    size = keys.number("sliding_window", whole=True) if in_use else None
    windows = keys.windows(size, [i >= keys["max_window_layers"] for i in range(sizes["n_layers"])])
    if size is None:
        keys.only("layer_types", ["full_attention"] * sizes["n_layers"])
    return {"activation": keys.activation("hidden_act", *ACTIVATIONS), "windows": windows}


def _write(config: ModelConfig) -> dict[str, Any]:
    windows = config.windows or (None,) * config.n_layers
    size = next((window for window in windows if window is not None), None)
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"sliding_window": size, "use_sliding_window": size is not None, "layer_types": kinds}


FAMILY = Family("qwen2", "Qwen2", _DEFAULTS, llama.TRAITS | {"qkv_bias": True}, _read, _write)
