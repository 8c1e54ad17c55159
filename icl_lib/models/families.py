"""Where each weight of a `Transformer` lies in a Hugging Face checkpoint, family by family, and the config that goes with it."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from icl_lib.models.config import ModelConfig
from icl_lib.models.transformer import Transformer


class Source(NamedTuple):
    """Row i of a leaf is row `rows[i]` of the checkpoint's tensor `name`; `rows` None means all rows in their order."""

    name: str
    rows: np.ndarray | None = None


# Our path of a leaf inside a block (or outside all) -> name in the checkpoint, behind the family's prefix of the block.
_COMMON = {
    "embed": "model.embed_tokens.weight",
    "unembed": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "ln1.weight": "input_layernorm.weight",
    "ln2.weight": "post_attention_layernorm.weight",
    **{f"attn.{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn.b_{x}": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"mlp.b_{x}": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
_GEMMA2 = _COMMON | {
    "ln1_post.weight": "post_attention_layernorm.weight",
    "ln2.weight": "pre_feedforward_layernorm.weight",
    "ln2_post.weight": "post_feedforward_layernorm.weight",
}
_PHI3 = (
    _COMMON
    | {f"attn.{x}": "self_attn.qkv_proj.weight" for x in "qkv"}
    | {f"mlp.{x}": "mlp.gate_up_proj.weight" for x in ("gate", "up")}
)
_NEOX = {
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
_NAMES = {"gemma": _COMMON, "gemma2": _GEMMA2, "phi3": _PHI3, "gpt_neox": _NEOX, "qwen2": _COMMON, "llama": _COMMON}
_CLASSES = {
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "phi3": "Phi3",
    "gpt_neox": "GPTNeoX",
    "qwen2": "Qwen2",
    "llama": "Llama",
}
_BUFFERS = re.compile(r"(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def abstract(config: ModelConfig) -> Transformer:
    """The model with shapes in the place of arrays: nothing is computed or allocated."""
    return eqx.filter_eval_shape(Transformer.init, config, key=jax.random.key(0))


def leaf_path(path) -> str:
    """The name of a leaf from its key path: "embed", "blocks.3.attn.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def sources(config: ModelConfig) -> dict[str, Source]:
    """Where every leaf of the model comes from, by the leaf's path."""
    names, prefix = _NAMES[config.family], "gpt_neox.layers" if config.family == "gpt_neox" else "model.layers"
    rows = _rows(config)
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract(config)):
        leaf = leaf_path(path)
        if leaf.startswith("blocks."):
            _, layer, inside = leaf.split(".", 2)
            found[leaf] = Source(f"{prefix}.{layer}.{names[inside]}", rows.get(inside))
        else:
            found[leaf] = Source(names[leaf])
    return found


def _rows(config: ModelConfig) -> dict[str, np.ndarray]:
    """Rows of the fused tensors that belong to each leaf of a block."""
    width, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    if config.family == "phi3":  # q, k, v one after the other; gate, then up
        q, k, v = np.split(np.arange(width + 2 * kv), [width, width + kv])
        gate, up = np.split(np.arange(2 * config.d_mlp), 2)
        return {"attn.q": q, "attn.k": k, "attn.v": v, "mlp.gate": gate, "mlp.up": up}
    if config.family == "gpt_neox":  # for each head its q, k and v
        by_head = np.arange(3 * width).reshape(config.n_heads, 3, config.d_head)
        return {f"attn.{b}{x}": by_head[:, i].reshape(-1) for i, x in enumerate("qkv") for b in ("", "b_")}
    return {}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    where, shapes = sources(config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)):
        name, rows = where[leaf_path(path)]
        before = shapes.get(name, (0,))[0] if rows is not None else 0
        shapes[name] = (before + leaf.shape[0], *leaf.shape[1:])
    return shapes


def n_params(config: ModelConfig) -> int:
    """Number of parameters, a tied embedding counted once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def ignored(config: ModelConfig, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no such weight: buffers, and copies of a tied embedding."""
    return bool(_BUFFERS.search(name)) or (config.tied and name in ("lm_head.weight", "embed_out.weight"))


def known_config(name: str) -> ModelConfig | None:
    """The config of one of the models that our cards name, without a network; None for any other.

    An instruction-tuned model ("-it", "-Instruct") has the sizes of its base model.
    """
    known = json.loads((Path(__file__).parent / "known_configs.json").read_text())
    raw = known.get(name, known.get(name.removesuffix("-it").removesuffix("-Instruct")))
    return None if raw is None else ModelConfig.from_hf(raw, source=name)


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` from which transformers builds this model, with the field names of its family."""
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    raw = {
        "architectures": [f"{_CLASSES[config.family]}ForCausalLM"],
        "model_type": config.family,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "intermediate_size": config.d_mlp,
        "vocab_size": config.d_vocab,
        "max_position_embeddings": config.n_ctx,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation,
        "attention_bias": config.out_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": [config.eos_id, *config.more_eos] if config.more_eos else config.eos_id,
        "pad_token_id": config.pad_id,
        "torch_dtype": dtype,
    }
    return raw | _own_fields(config, activation)


def _own_fields(config: ModelConfig, activation: str) -> dict[str, Any]:
    """The fields that only this family has."""
    part = 1.0 if config.rotary_dim is None else config.rotary_dim / config.d_head
    scaling = config.rope_scaling
    llama3 = scaling and {
        "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": scaling.original_n_ctx,
    }  # fmt: skip
    window = next((w for w in config.windows or () if w is not None), None)
    kinds = [
        "full_attention" if w is None else "sliding_attention" for w in config.windows or (None,) * config.n_layers
    ]
    match config.family:
        case "gemma":
            return {"hidden_activation": activation}
        case "gemma2":
            return {
                "hidden_activation": activation,
                "query_pre_attn_scalar": config.d_head if config.attn_scale is None else round(config.attn_scale**-2),
                "attn_logit_softcapping": config.attn_softcap,
                "final_logit_softcapping": config.logit_softcap,
                "sliding_window": window,
                "layer_types": kinds,
            }
        case "phi3":
            return {
                "sliding_window": window,
                "partial_rotary_factor": part,
                "original_max_position_embeddings": config.n_ctx,
            }
        case "qwen2":
            return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": kinds}
        case "gpt_neox":
            return {
                "layer_norm_eps": config.norm_eps,
                "rotary_emb_base": config.rope_theta,
                "rotary_pct": part,
                "use_parallel_residual": config.parallel,
            }
        case _:
            return {"mlp_bias": config.mlp_bias, "rope_scaling": llama3}
